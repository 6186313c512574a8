"""`nemotron runs list | show | logs | cancel`; `diff` and `compare` have a module of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts import records
from nemotron_recipes.cli import compare, follow, summary
from nemotron_recipes.cli.text import age, table
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.rundir import RunDir


@click.group()
def runs() -> None:
    """List, show, follow and cancel runs. RUN is an id or a unique part of one."""


@runs.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
@click.option("-n", "--number", type=click.IntRange(min=1), default=20, show_default=True, help="Newest N runs.")
def list_command(as_json: bool, number: int) -> None:
    """List the newest runs and their states."""
    found = lifecycle.newest_runs(_root(), number)
    if as_json:
        click.echo(json.dumps([summary.as_tree(view) for view in found], indent=2))
    elif not found:
        click.echo(f"no runs yet in {_root()}")
    else:
        rows = [(v.id, v.state, age(v.created), " ".join(f"{s.name}:{s.state}" for s in v.stages)) for v in found]
        click.echo(table(("RUN", "STATE", "CREATED", "STAGES"), rows))


@runs.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def show(run: str, as_json: bool) -> None:
    """Show a run: states, inputs, outputs, results, and why it failed."""
    view = lifecycle.load(_find(run))
    click.echo(json.dumps(summary.as_tree(view), indent=2) if as_json else summary.describe(view))


@runs.command()
@click.argument("run")
@click.option("-f", "--follow", "wait", is_flag=True, help="Follow to the end; exit with the run's own code.")
@click.option("--stage", metavar="STAGE", help="Only this stage  [default: all with -f, else the last that started]")
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True, help="Whose log to show.")
def logs(run: str, wait: bool, stage: str | None, rank: int) -> int:
    """Show the log of a run's newest attempt. Ctrl-C ends the following, not the run."""
    folder = RunDir(_find(run))
    view = lifecycle.load(folder.path)
    if stage:
        view.stage(stage)
    if not wait:
        started = [s.name for s in view.stages if s.attempt]
        if not started:
            raise UserError(f"no stage of {view.id} has started; its launcher's log: {folder.driver_log}")
        follow.show_logs(folder, stage or started[-1], rank, click.echo)
        return 0
    if view.handle is None:
        raise UserError(f"{view.id} was never submitted")
    follower = follow.Follower(folder, stage, rank, bar=sys.stdout.isatty())
    lifecycle.watch(view.handle, follower.poll)
    follower.poll(last=True)
    return follow.finish(folder)


@runs.command()
@click.argument("run")
def cancel(run: str) -> None:
    """Stop a run and everything that it started."""
    view = lifecycle.load(_find(run))
    if view.state not in ("running", "pending") or view.handle is None:
        raise UserError(Problem(f"run {view.id} is not running: it is {view.state}", view.path))
    lifecycle.cancel(view.handle)
    after = lifecycle.load(Path(view.path))
    click.echo(printable(f"{view.id}: {after.state}"))


runs.add_command(compare.diff)
runs.add_command(compare.compare)


def _root() -> Path:
    return read_environment().output / "runs"


def _find(text: str) -> Path:
    return records.find_run(_root(), text)
