"""`nemotron artifacts list | show | alias` and `nemotron lineage`: what the store holds and where it came from."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import click

from nemotron_recipes.artifacts.lineage import RENDERERS
from nemotron_recipes.artifacts.lineage import lineage as read_lineage
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.cli import stores
from nemotron_recipes.cli.stores import PROFILE, store_of
from nemotron_recipes.cli.text import ago, short, size, table, write_page
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.mirror.journal import Journal, mark
from nemotron_recipes.spec import Artifact

NAME = click.argument("name", metavar="NAME[:VERSION]")


@click.group()
def artifacts() -> None:
    """List and show what the store holds. VERSION is vN, latest or an alias of yours."""


@artifacts.command("list")
@PROFILE
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def list_command(profile: str | None, as_json: bool) -> None:
    """List every artifact: newest version, kind, size, and the run that made it."""
    store = store_of(profile)
    rows = list(store.newest())
    if as_json:
        lines = [
            json.dumps({**m, "versions": len(store.versions(a.name)), "aliases": store.aliases(a.name), "uri": a.uri})
            for a, m in rows
        ]
        click.echo("[\n  " + ",\n  ".join(lines) + "\n]" if lines else "[]")
    elif not rows:
        click.echo(f"no artifacts yet in {store.named}")
    else:
        cells = [
            (
                f"{a.name}:v{a.version}",
                a.kind,
                size(m["size"]),
                ago(m["created"]),
                (m["producer"] or {}).get("run", ""),
            )
            for a, m in rows
        ]
        click.echo(table(("ARTIFACT", "KIND", "SIZE", "CREATED", "MADE BY"), cells))


@artifacts.command()
@NAME
@click.option("--verify", is_flag=True, help="Read all its data and compare with the recorded digest.")
@PROFILE
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def show(name: str, verify: bool, profile: str | None, as_json: bool) -> None:
    """Show one version: digest, folder, producer, parents, results."""
    store = store_of(profile)
    artifact = store.resolve(name)
    if verify:
        stores.verify(profile, artifact)
    manifest = store.describe(artifact)
    if as_json:
        click.echo(json.dumps({**manifest, "uri": artifact.uri}, indent=2))
        return
    made = manifest["producer"] or {}
    lines = [
        f"{artifact.label}  ({manifest['kind']}{', verified' if verify else ''})",
        f"  folder    {artifact.uri}",
        f"  digest    {manifest['digest']}",
        f"  size      {size(manifest['size'])} in {manifest['files']} files",
        f"  created   {_iso(manifest['created'])}",
    ]
    if made:
        lines.append(f"  made by   {made['stage']} of {made['run']}, fingerprint {short(made['fingerprint'])}")
    for parent in manifest["parents"]:
        label = Artifact.from_tree({k: v for k, v in parent.items() if k != "input"}).label
        lines.append(f"  input     {parent['input']} = {label}  {short(parent['digest'])}")
    lines += [f"  result    {key} = {value}" for key, value in manifest["results"].items()]
    versions, aliases = store.versions(artifact.name), store.aliases(artifact.name)
    lines.append(f"  versions  {', '.join(f'v{v}' for v in versions)}")
    lines += [f"  alias     {alias} = v{version}" for alias, version in aliases.items()]
    click.echo(printable("\n".join(lines)))


@artifacts.command()
@NAME
@click.argument("alias")
@click.option("--delete", is_flag=True, help="Let NAME:ALIAS mean nothing any more.")
def alias(name: str, alias: str, delete: bool) -> None:
    """Let NAME:ALIAS mean this version from now on."""
    store = store_of(None)
    artifact = store.resolve(name)
    had = _meant(store, artifact.name, alias)
    if delete:
        store.unalias(artifact.name, alias)
    else:
        store.alias(artifact.name, alias, artifact.version or 0)
    for version in [artifact, *had] if not delete else had:
        _tell_wandb(version)
    no_longer = [f"v{version.version}" for version in had if delete or version.version != artifact.version]
    lines = [] if delete else [f"{artifact.name}:{alias} is v{artifact.version}"]
    click.echo(", ".join([*lines, *(f"{artifact.name}:{alias} is no longer {was}" for was in no_longer)]))


def _meant(store: Store, name: str, alias: str) -> list[Artifact]:
    """The version that an alias means so far; none where it is new, damaged, or its version is gone."""
    with suppress(UserError):
        return [store.resolve(f"{name}:{alias}")] if alias in store.aliases(name) else []
    return []


def _tell_wandb(artifact: Artifact) -> None:
    """The run that made a version has something to be told: its aliases are others."""
    output = read_environment().output
    if artifact.producer and Journal(output / "runs" / artifact.producer.run).target is not None:
        mark(output, artifact.producer.run)


@artifacts.command()
@click.option("--output", type=click.Path(path_type=Path), help="Folder of runs  [default: env.toml's]")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def sync(output: Path | None, as_json: bool) -> int:
    """Tell W&B what it doesn't know yet of runs that [wandb] of env.toml mirrors."""
    from nemotron_recipes import lifecycle

    if output is not None and not output.is_dir():
        fix = "the folder that holds runs/ and store/, as [artifacts] output of env.toml names it"
        raise UserError(Problem(f"--output {output}: there is no such folder", "command line", fix))
    outcomes = lifecycle.mirror(output or read_environment().output)
    if as_json:
        click.echo(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    for outcome in () if as_json else outcomes:
        why = outcome.why or "the run goes on"
        rest = f", {outcome.left} left: {why}" if outcome.why or outcome.left else ""
        click.echo(printable(f"{outcome.run}: {outcome.told} told{rest}"))
    if not outcomes and not as_json:
        click.echo("nothing to tell W&B")
    return 1 if any(outcome.why for outcome in outcomes) else 0


@click.command()
@NAME
@click.option("--format", "form", type=click.Choice(sorted(RENDERERS)), default="tree", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--html", "page", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write a page.")
@PROFILE
def lineage(name: str, form: str, as_json: bool, page: Path | None, profile: str | None) -> None:
    """Draw what an artifact came from, back to the data."""
    if ((as_json or page) and form != "tree") or (as_json and page):
        raise UserError(Problem("--json, --html and --format exclude each other", "command line"))
    store = store_of(profile)
    if page is not None:
        from nemotron_recipes.report.html import lineage_page

        write_page(page, lineage_page(read_lineage(store, store.resolve(name))))
        return
    click.echo(RENDERERS["json" if as_json else form](read_lineage(store, store.resolve(name))))


def _iso(created: float) -> str:
    return datetime.fromtimestamp(created, timezone.utc).isoformat(timespec="seconds")
