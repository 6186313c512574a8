"""`nemotron runs list | show | logs | shell | cancel`; the other commands of `runs` have modules of their own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from nemotron_recipes import lifecycle, sweep
from nemotron_recipes.artifacts import records
from nemotron_recipes.cli import attach, compare, explain, follow, summary, tensorboard, watch
from nemotron_recipes.cli.text import age, table, write_page
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import NemotronError, Problem, UserError, printable
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
        trees = [{**summary.as_tree(view), "differences": list(view.differences)} for view in found]
        click.echo(json.dumps(trees, indent=2))
    elif not found:
        click.echo(f"no runs yet in {_root()}")
    else:
        rows = [(v.id, v.state, age(v.created), " ".join(f"{s.name}:{s.state}" for s in v.stages)) for v in found]
        click.echo(table(("RUN", "STATE", "CREATED", "STAGES"), rows))
        for sentence, runs_of in _by_sentence(found).items():
            click.echo(printable(f"note  {', '.join(runs_of)}: {sentence}"))


@runs.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
@click.option("--html", "page", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write a page.")
@click.option("--verify", is_flag=True, help="Read all its files and outputs, and compare with the recorded digests.")
def show(run: str, as_json: bool, page: Path | None, verify: bool) -> int:
    """Show a run: states, inputs, outputs, results, and why it failed.

    Exit code 1 while it can't be told whether the scheduler has accepted it.
    """
    view = lifecycle.load(_find(run))
    if verify:
        from nemotron_recipes.report.verify import damage, unread

        if problems := damage(view):
            raise UserError(*problems)
    decided = view.handle is None or view.state != "pending" or lifecycle.look(view.handle).accepted
    if page is not None:
        from nemotron_recipes.report.html import run_page

        write_page(page, run_page(view))
        return 0 if decided else 1
    differences = [*(lifecycle.differences(view.handle) if view.handle else []), *view.differences]
    if as_json:
        click.echo(json.dumps({**summary.as_tree(view), "differences": differences}, indent=2))
    else:
        click.echo(summary.describe(view, differences))
        if verify:
            click.echo("\nverified: its files, checkpoints and outputs are what was written")
            for folder in unread(view):
                click.echo(printable(f"not verified: {folder} has no digests of all its files"))
    return 0 if decided else 1


@runs.command()
@click.argument("run")
@click.option("-f", "--follow", "wait", is_flag=True, help="Follow to the end; exit with the run's own code.")
@click.option("--stage", metavar="STAGE", help="Only this stage  [default: all with -f, else the last that started]")
@click.option("--rank", type=click.IntRange(min=0), help="Whose log to show  [default: 0]")
@click.option("--all-ranks", is_flag=True, help="Show every rank's log, each line tagged.")
def logs(run: str, wait: bool, stage: str | None, rank: int | None, all_ranks: bool) -> int:
    """Show the log of a run's newest attempt. Ctrl-C ends the following, not the run."""
    if all_ranks and rank is not None:
        raise UserError(Problem("--rank and --all-ranks exclude each other", "command line"))
    whose = None if all_ranks else rank or 0
    folder = RunDir(_find(run))
    view = lifecycle.load(folder.path)
    if stage:
        view.stage(stage)
    if not wait:
        started = [s.name for s in view.stages if s.attempt]
        if not started:
            raise UserError(f"no stage of {view.id} has started; its launcher's log: {folder.driver_log}")
        follow.show_logs(folder, stage or started[-1], whose)
        return 0
    if view.handle is None:
        raise UserError(f"{view.id} was never submitted")
    return attach.followed(view.handle, follow.Follower(folder, stage, whose, bar=sys.stdout.isatty()))


@runs.command()
@click.argument("run")
@click.option("--stage", metavar="STAGE", help="Beside which stage  [default: the one that runs]")
@click.argument("command", nargs=-1, metavar="[-- COMMAND...]")
def shell(run: str, stage: str | None, command: tuple[str, ...]) -> None:
    """Open a shell, or run COMMAND, where a stage runs: in its allocation, and in its image where it has one."""
    view = lifecycle.load(_find(run))
    if stage:
        view.stage(stage)
    running = stage or next((s.name for s in view.stages if s.state in ("running", "stalled")), None)
    if view.handle is None or running is None:
        between = view.state in ("running", "stalled")
        why = "one is over, and the next has not begun" if between else f"it is {view.state}"
        raise UserError(Problem(f"no stage of {view.id} is running: {why}", view.path))
    argv = lifecycle.shell(view.handle, running, command or ("bash",))
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        raise UserError(f"{argv[0]} can't be started: {error.strerror}") from None


@runs.command()
@click.argument("run")
def cancel(run: str) -> int:
    """Stop a run, or all of a sweep, and everything that was started for it."""
    members = sweep.runs_of(_root().parent, run)
    if members:
        views = lifecycle.load_all([_root() / name for name in members])
        codes = [0]
        for view in views:  # the newest first: they wait for the others
            if view.state in sweep.GOES_ON and view.handle is not None:
                try:
                    lifecycle.cancel(view.handle)
                except NemotronError as error:  # that one can't be stopped is no reason to let the others run
                    click.echo(printable(f"error: {error}"), err=True)
                    codes.append(error.exit_code)
        for after in lifecycle.load_all([_root() / name for name in members]):
            click.echo(printable(f"{after.id}: {after.state}"))
        return max(codes)
    view = lifecycle.load(_find(run))
    over = view.state not in ("running", "stalled", "pending")
    if view.handle is None or (over and not lifecycle.left_behind(view.handle)):
        raise UserError(Problem(f"run {view.id} is not running: it is {view.state}", view.path))
    lifecycle.cancel(view.handle)
    after = lifecycle.load(Path(view.path))
    click.echo(printable(f"{view.id}: {after.state}"))
    return 0


runs.add_command(watch.watch)
runs.add_command(compare.diff)
runs.add_command(compare.compare)
runs.add_command(tensorboard.tensorboard)
runs.add_command(explain.explain_command)


def _by_sentence(views: list[records.RunView]) -> dict[str, list[str]]:
    """Where sources disagree -> the runs of which that is said: that Slurm can't be asked is said once."""
    found: dict[str, list[str]] = {}
    for view in views:
        for sentence in view.differences:
            found.setdefault(sentence, []).append(view.id)
    return found


def _root() -> Path:
    return read_environment().output / "runs"


def _find(text: str) -> Path:
    return records.find_run(_root(), text)
