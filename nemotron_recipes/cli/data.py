"""`nemotron data show | convert | from-logs`: look at prepared data, convert them, make rows of logs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.spec import Artifact

if TYPE_CHECKING:
    from nemotron_recipes.data.show import Shown


@click.group()
def data() -> None:
    """Look at prepared data, convert them, and make rows from logs. Preparing them is `nemotron FAMILY data prep`."""


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
        card = folder / "data-card.md"
        if not card.is_file():
            raise UserError(Problem(f"{folder} has no data card", fix="show one row of it with --row N"))
        click.echo(printable(card.read_text(encoding="utf-8")))
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


@data.command("from-logs")
@click.argument("logs", nargs=-1, required=True, metavar="LOGS.jsonl...",
                type=click.Path(exists=True, dir_okay=False, path_type=Path))  # fmt: skip
@click.option("--to", "target", type=click.Choice(["sft", "kto", "dpo"]), required=True, help="What rows to make.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE")
@click.option("--score-field", metavar="FIELD", help="Where the score stands; meta.score goes into an object.  [score]")
@click.option("--judges", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE.yaml",
              help="Ask these models for scores from 1 to 10 instead.")  # fmt: skip
@click.option("--people-field", metavar="FIELD", help="Calibrate judges by people's scores, where a line has one.")
@click.option("--min-score", type=float, required=True, help="Good answers score this or more.")
@click.option("--max-score", type=float, help="Bad answers score this or less (kto, dpo).")
@click.option("--margin", type=float, default=0.0, help="dpo: how far apart two answers must lie.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the report for programs.")
def from_logs_command(
    logs: tuple[Path, ...], target: str, out: Path, score_field: str | None, judges: Path | None,
    people_field: str | None, min_score: float, max_score: float | None, margin: float, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make rows of conversation logs by their scores: SFT rows, KTO rows, preference pairs.

    A line is {"messages": [...]} ending with the answer, or {"request": {"messages"}, "response": {"choices"}}; files
    may end in .gz or .zst. Scores stand in a field, or judges give them; docs/data.md has the judges' file. What judges
    said is kept in FILE.judged.jsonl, so that a second run asks only what is new. The report goes to FILE.report.json.
    """
    from nemotron_recipes.data.exchanges import Limits
    from nemotron_recipes.data.from_logs import Request, from_logs
    from nemotron_recipes.data.judges import read_ensemble

    problems = []
    if judges and score_field:
        problems.append(Problem("--judges and --score-field exclude each other", "command line"))
    if people_field and not judges:
        problems.append(Problem("--people-field is for --judges", "command line"))
    if max_score is not None and max_score >= min_score:
        problems.append(Problem(f"--max-score {max_score:g} is not below --min-score {min_score:g}", "command line"))
    if out.exists() and not force:
        problems.append(Problem(f"{out} is there already", fix="give another --out, or --force"))
    if target == "kto" and max_score is None:
        problems.append(Problem("kto needs to know what is bad", "command line", "--max-score N"))
    if problems:
        raise UserError(*problems)
    ensemble = read_ensemble(judges) if judges else None
    limits = Limits(min_score, max_score, margin)
    field = None if judges else score_field or "score"
    request = Request(logs, target, out, limits, field, ensemble, people_field)
    report = from_logs(request, lambda done: click.echo(f"{done} answers judged", err=True))
    text = json.dumps(report, indent=2) + "\n"
    write_atomic(out.with_name(out.name + ".report.json"), text.encode())
    click.echo(text.rstrip() if as_json else _report(report, out))


def _report(report: dict[str, Any], out: Path) -> str:
    left = ", ".join(f"{count} {reason}" for reason, count in report["left_out"].items())
    made = f"{report['rows']} {report['target']} rows in {out}"
    lines = [f"{report['lines']} lines, {report['exchanges']} answers; {made}", f"left out: {left or 'nothing'}"]
    found = report.get("agreement")
    if found is None:
        return printable("\n".join(lines))
    for name, one in found["judges"].items():
        scale = f"calibrated {one['slope']:.2f} x + {one['intercept']:.2f}"
        people = f", Spearman with people {one['people_spearman']}" if "people" in one else ""
        if one["constant"]:
            scale, people = "the same for every answer: left out of the scores", ""
        lines.append(f"judge {name}: {one['scored']} scored, mean {one['mean']}, {scale}{people}")
    for pair in found["pairs"]:
        who, apart = " and ".join(pair["judges"]), pair["mean_difference"]
        if apart is not None:
            lines.append(f"{who}: Spearman {_known(pair['spearman'])}, mean difference {apart}")
    if found["krippendorff_alpha"] is not None:
        lines.append(f"Krippendorff's alpha {found['krippendorff_alpha']}")
    return printable("\n".join(lines))


def _known(figure: float | None) -> str:
    return "unknown (too few answers, or all alike)" if figure is None else str(figure)


@data.command()
@click.argument("name", metavar="ARTIFACT")
@click.argument("target", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option("--to", "layout", required=True, metavar="LAYOUT",
              help="sft: native, parquet, megatron_npy, megatron_indexed; dpo, kto, rl: trl, nemo_rl.")  # fmt: skip
@click.option("--pack-size", type=click.IntRange(min=8), metavar="N", help="Pack the sequences anew, N tokens a pack.")
def convert(name: str, target: Path, layout: str, pack_size: int | None) -> None:
    """Write ARTIFACT (NAME[:VERSION] or a folder) in another layout into the new FOLDER, without tokenising again.

    native, parquet and megatron_npy become each other, and megatron_indexed, which has no loss masks; trl and nemo_rl
    become each other, where a row has its place in both. Packed tokens don't become conversations.
    """
    from nemotron_recipes.data import convert as conversion

    folder, _ = _find(name)
    metadata = conversion.convert(folder, target.absolute(), layout, pack_size)
    click.echo(f"{len(metadata['files'])} files, {layout}: {target}")


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
