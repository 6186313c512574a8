"""`nemotron data show`: look at prepared data."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.spec import Artifact

if TYPE_CHECKING:
    from nemotron_recipes.data.show import Shown


@click.group()
def data() -> None:
    """Look at prepared data, and make rows from logs. Preparing them is `nemotron FAMILY data prep`."""


@data.command()
@click.argument("name", metavar="ARTIFACT")
@click.option("--row", type=int, metavar="N", help="Show row N (from 0) with its learned tokens marked.")
@click.option("--split", default="train", show_default=True, help="train, validation or test.")
@click.option("--html", "page", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a page.")
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="FOLDER",
              help="Where tokenizer.json lies, if not where it was.")  # fmt: skip
def show(name: str, row: int | None, split: str, page: Path | None, tokenizer: Path | None) -> None:
    """Show the data card of ARTIFACT (NAME[:VERSION] or a folder), or one row as a trainer sees it.

    On a terminal learned tokens are green; elsewhere they stand in ⟦brackets⟧.
    """
    from nemotron_recipes.data.show import load_tokenizer, read_metadata, show_row

    folder, manifest = _find(name)
    metadata = read_metadata(folder)
    if row is None:
        if page is not None:
            raise UserError(Problem("--html shows one row", "command line", "add --row N"))
        click.echo(printable((folder / "data-card.md").read_text(encoding="utf-8")))
        click.echo(f"{folder}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        shown = show_row(
            folder, metadata, load_tokenizer(tokenizer or _tokenizer(manifest, Path(scratch)), metadata), split, row
        )
    if page is not None:
        from nemotron_recipes.report.data import row_page

        page.write_text(row_page(name, shown), encoding="utf-8", errors="backslashreplace")
        click.echo(f"written: {page}")
        return
    click.echo(as_text(name, shown, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))


def as_text(name: str, shown: Shown, colour: bool) -> str:
    """Nothing that a row holds can steer the terminal."""
    facts = "".join(f", {key} {printable(value)}" for key, value in shown.facts.items())
    lines = [f"{name}, {shown.split}, row {shown.number} of {shown.rows}{facts}"]
    for part in shown.parts:
        marked = (
            click.style(printable(p.text), fg="green") if colour else f"⟦{printable(p.text)}⟧" for p in part.pieces
        )
        pairs = zip(part.pieces, marked, strict=True)
        text = "".join(mark if piece.learned else printable(piece.text) for piece, mark in pairs)
        lines += [f"── {part.title}", text]
    return "\n".join(lines)


def _find(name: str) -> tuple[Path, dict[str, Any] | None]:
    """(folder of the data, manifest of the artifact)."""
    if os.sep in name or Path(name).is_dir():
        folder = Path(name)
        return (folder / "content" if (folder / "content").is_dir() else folder), None
    store = Store(read_environment().store)
    artifact = store.resolve(name)
    if artifact.kind != "data":
        raise UserError(Problem(f"{artifact.label} is of kind '{artifact.kind}', not 'data'"))
    return store.content(artifact), store.describe(artifact)


def _tokenizer(manifest: dict[str, Any] | None, scratch: Path) -> Path:
    """The folder of the tokenizer that the artifact's record names."""
    for parent in manifest["parents"] if manifest else ():
        if parent["input"] == "data.tokenizer":
            artifact = Artifact.from_tree({key: value for key, value in parent.items() if key != "input"})
            if artifact.source == "builtin":
                from nemotron_recipes.tiny.tokenizer import write_tokenizer

                write_tokenizer(scratch)
                return scratch
            if artifact.source == "hub":
                from nemotron_recipes.data.fetch import fetch_tokenizer

                return fetch_tokenizer(artifact.name, artifact.revision)
            if artifact.uri:
                return Path(artifact.uri)
    raise UserError(Problem("nothing says which tokenizer made these data", fix="--tokenizer FOLDER"))
