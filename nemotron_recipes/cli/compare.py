"""`nemotron runs diff A B` and `nemotron runs compare A B C`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from nemotron_recipes import lifecycle, sweep
from nemotron_recipes.artifacts.records import RunView, find_run
from nemotron_recipes.cli.text import age, duration, table, write_page
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.report import compare as compared
from nemotron_recipes.spec import Tree

WIDEST = 60  # characters of a value in a table


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def diff(a: str, b: str, as_json: bool) -> None:
    """Show what differs between two runs: config, code, inputs, environment, results."""
    views = _views((a, b))
    found = compared.differences(*views)
    if as_json:
        click.echo(json.dumps({"runs": [view.id for view in views], **found}, indent=2))
        return
    lines = [f"a = {views[0].id}", f"b = {views[1].id}"]
    for section, rows in found.items():
        lines += ["", f"{section}: the same"] if not rows else ["", section]
        lines += [f"  {key}: {_short(was)} -> {_short(is_)}" for key, (was, is_) in rows.items()]
    click.echo(printable("\n".join(lines)))


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--plot", metavar="FILE.svg|png", type=click.Path(dir_okay=False, path_type=Path), help="Draw metrics.")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def compare(runs: tuple[str, ...], plot: Path | None, as_json: bool) -> None:
    """Show runs, or all of a sweep, side by side: configs, step time, tokens/s, memory, wall time, exit, results."""
    views = _views(runs)
    if len(views) < 2:
        raise UserError(Problem("one run alone can't be compared", "command line", "name two or more"))
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise UserError(Problem(f"--plot {plot}: the name must end with .svg or .png", "command line"))
    found = compared.comparison(views)
    if plot is not None:
        from nemotron_recipes.report.plots import draw_metrics

        write_page(plot, draw_metrics(views, plot.suffix.removeprefix(".")), say=False)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(_text(found))
    if plot is not None:
        click.echo(f"\nmetrics over steps: {plot}")


def _text(found: Tree) -> str:
    names = {
        f"{chr(ord('a') + number)}" if number < 26 else str(number): run for number, run in enumerate(found["runs"])
    }
    parts = [
        table(("", "RUN", "STATE", "CREATED"), [(n, r["id"], r["state"], age(r["created"])) for n, r in names.items()])
    ]
    for stage in dict.fromkeys(stage for run in names.values() for stage in run["stages"]):
        figures = [(name, run["stages"][stage]) for name, run in names.items() if stage in run["stages"]]
        results = sorted({key for _, figure in figures for key in figure["results"]})
        facts = sorted({key for _, figure in figures for key in figure["facts"]})
        header = ("", "STATE", "EXIT", "WALL", "STEPS", "STEP TIME", "TOKENS/S", "MEMORY", *facts, *results)
        rows = [
            (
                *(name, *_cells(figure), *(figure["facts"].get(key, "-") for key in facts)),
                *(_short(figure["results"].get(key)) for key in results),
            )
            for name, figure in figures
        ]
        parts += [f"\n{stage}", table(header, rows)]
    rows = [(key, *(_short(value) for value in values)) for key, values in found["config"].items()]
    stages = dict.fromkeys(stage for run in names.values() for stage in run["stages"])
    has = {stage: [name for name, run in names.items() if stage in run["stages"]] for stage in stages}
    some = [f"  {stage}: only in {', '.join(which)}" for stage, which in has.items() if len(which) < len(names)]
    parts += ["\nconfig", table(("KEY", *names), rows) if rows else "  the same in all"] if len(some) < len(has) else []
    parts += ["\nstages that not all have, and whose config isn't compared", *some] if some else []
    return "\n".join(parts)


def _cells(figure: Tree) -> tuple[str, ...]:
    def told(key: str, form: Any) -> str:
        return "-" if figure[key] is None else form(figure[key])

    return (
        figure["state"],
        told("exit_code", str),
        told("wall_seconds", duration),
        told("steps", str),
        told("seconds_per_step", lambda seconds: f"{seconds:.3g} s"),
        told("tokens_per_second", lambda rate: f"{rate:,.0f}"),
        told("memory_bytes", lambda size: f"{size / 2**30:.2f} GiB"),
    )


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def _views(runs: tuple[str, ...]) -> list[RunView]:
    output = read_environment().output
    named = [name for text in runs for name in sweep.runs_of(output, text) or [text]]
    return [lifecycle.load(find_run(output / "runs", name)) for name in named]
