"""`nemotron runs explain`: why a run waits, or why it failed, with what proves it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts.causes import Diagnosis, diagnose
from nemotron_recipes.artifacts.records import RunView, find_run
from nemotron_recipes.cli.text import clock
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import printable
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import Wait

LOGS_NAMED = 6


def explain(view: RunView, as_json: bool) -> str:
    """Why the run stands where it stands."""
    stages = [stage for stage in view.stages if stage.state in ("failed", "lost")]
    if not stages and view.state in ("failed", "lost"):  # its job ended before anything of ours ran in it
        stages = [stage for stage in view.stages if stage.state == "pending"][:1]
    found = [diagnose(RunDir(Path(view.path)), stage.name, stage.attempt) for stage in stages]
    waits = lifecycle.waits(view.handle) if view.handle and view.state in ("pending", "running", "stalled") else []
    if as_json:
        tree: dict[str, Any] = {"id": view.id, "state": view.state, "explanation": view.explanation}
        tree |= {"waits": [asdict(wait) for wait in waits], "failures": [asdict(each) for each in found]}
        return json.dumps(tree, indent=2)
    lines = [f"{view.id}: {view.state}"]
    for wait in waits:
        lines += _wait(wait)
    for each in found:
        lines += _diagnosis(each)
    if not waits and not found:
        lines += [view.explanation] if view.explanation else [_nothing(view)]
    return printable("\n".join(lines))


def _wait(wait: Wait) -> Iterator[str]:
    yield f"{wait.stage} waits (job {wait.job}): {wait.words} ({wait.reason})"
    yield from (f"  limit  {limit}" for limit in wait.limits)
    yield from (f"  fits   {fit}" for fit in wait.fits)
    if wait.start is not None:
        yield f"  start  about {clock(wait.start)}, as Slurm expects"


def _diagnosis(found: Diagnosis) -> Iterator[str]:
    if found.cause is None:
        yield f"{found.stage} failed, and it is not known why. What there is:"
    else:
        yield f"{found.stage} failed: {found.cause.words} ({found.cause.name})"
    if found.first:
        yield f"  first  {found.first.splitlines()[0]}"
    file = ""
    for line in found.evidence:
        if line.file != file:
            file = line.file
            yield f"  in     {file}"
        number = f"{line.number:>5}" if line.number else "     "
        yield f"  {number}  | {line.text}"
    if found.cause is not None:
        yield f"  fix    {found.cause.fix}"
    for log in found.logs[:LOGS_NAMED]:
        yield f"  log    {log}"
    if len(found.logs) > LOGS_NAMED:
        yield f"         ... and {len(found.logs) - LOGS_NAMED} more beside them"


def _nothing(view: RunView) -> str:
    return "nothing is wrong with it" if view.state in ("running", "succeeded") else "nothing more is known"


@click.command("explain")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def explain_command(run: str, as_json: bool) -> None:
    """Say why a run waits or why it failed, and show the lines that prove it."""
    view = lifecycle.load(find_run(read_environment().output / "runs", run))
    click.echo(explain(view, as_json))
