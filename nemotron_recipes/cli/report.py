"""`nemotron report NAME[:VERSION]`: report.md, or release notes between two versions."""

from __future__ import annotations

from pathlib import Path

import click

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts.lineage import lineage
from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.cli.stores import PROFILE, store_of
from nemotron_recipes.cli.text import write_page
from nemotron_recipes.config.profiles import Environment, read_environment
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.spec import Artifact


@click.command()
@click.argument("name", metavar="NAME[:VERSION]")
@click.option("--since", metavar="VERSION", help="Release notes instead: what changed since that version.")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("."),
    help="Where to write  [default: here]",
)
@PROFILE
def report(name: str, since: str | None, output: Path, profile: str | None) -> None:
    """Write report.md (results, curves, data, config, environment, lineage), or release-notes.md with --since."""
    from nemotron_recipes.report import document
    from nemotron_recipes.report.plots import draw_metrics, metric_names

    environment = read_environment()
    store = store_of(profile)
    artifact = store.resolve(name)
    view = _run_of(environment, artifact)
    if since is not None:
        old = store.resolve(f"{artifact.name}:{since}")
        if old.version == artifact.version:
            raise UserError(Problem(f"{old.label} is that version itself", "command line", "--since an older one"))
        notes = document.release_notes(store, old, artifact, (_run_of(environment, old), view))
        write_page(output / "release-notes.md", notes)
        return
    curves = view is not None and bool(metric_names([view]))
    text = document.report(store, artifact, lineage(store, artifact), view, curves)
    if view is not None and curves:
        write_page(output / document.CURVES, draw_metrics([view]))
    write_page(output / "report.md", text)


def _run_of(environment: Environment, artifact: Artifact) -> RunView | None:
    """The run that made a version, where its folder is still here."""
    folder = environment.output / "runs" / artifact.producer.run if artifact.producer else None
    return lifecycle.load(folder) if folder and (folder / "plan.json").exists() else None
