"""Stay with a run until it has ended: what Ctrl-C means then, and which exit code the end has."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.cli import summary
from nemotron_recipes.cli.follow import Follower
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import JobHandle

AGAIN_SECONDS = 3.0  # within which a second Ctrl-C cancels a run that the first one has left
INTERRUPTED = 130


class HungUp(KeyboardInterrupt):
    """The terminal was closed, or somebody told this process to end."""


def attached(handle: JobHandle, as_json: bool, all_ranks: bool = False, quiet: bool = False) -> int:
    """Follow a run to its end: 0 succeeded, 1 failed, 130 cancelled or left.

    Ctrl-C stops a run on this machine. One that a scheduler carries goes on; a second Ctrl-C cancels it.
    """
    run = RunDir(Path(handle.run_dir))
    rank = None if all_ranks else 0
    follower = Follower(run, rank=rank, bar=sys.stdout.isatty(), quiet=quiet or as_json)
    if not (as_json or quiet):
        click.echo(f"run {handle.run}")
    with stop_signals():
        try:
            lifecycle.watch(handle, (lambda outlook: None) if as_json else follower.poll)
        except (KeyboardInterrupt, BrokenPipeError) as reason:
            if lifecycle.detaches(handle):
                if isinstance(reason, BrokenPipeError):  # nobody reads any more
                    raise
                if not asked_again(reason, handle.run, f"nemotron runs logs -f {handle.run}"):
                    return INTERRUPTED
            with suppress(OSError):
                click.echo("\nstopping the run ...", err=True)
            try:
                lifecycle.cancel(handle)
            except KeyboardInterrupt:  # whoever carries the run goes on stopping it
                click.echo(f"its end was not waited for: nemotron runs show {handle.run}", err=True)
                return INTERRUPTED
            if isinstance(reason, BrokenPipeError):  # as with a closed terminal
                raise
    if not as_json:
        follower.poll(last=True)
    return finish(run, as_json)


def followed(handle: JobHandle, follower: Follower) -> int:
    """Follow a run that somebody else has started; Ctrl-C ends the following alone."""
    lifecycle.watch(handle, follower.poll)
    follower.poll(last=True)
    return finish(follower.run)


def finish(run: RunDir, as_json: bool = False) -> int:
    """Say how a run ended; its exit code."""
    view = lifecycle.load(run.path)
    click.echo(json.dumps(summary.as_tree(view), indent=2) if as_json else summary.closing(view))
    return exit_code(view)


def exit_code(view: RunView) -> int:
    """0 succeeded, 130 cancelled, 1 anything else that has ended."""
    return {"succeeded": 0, "cancelled": INTERRUPTED}.get(view.state, 1)


def asked_again(reason: BaseException, name: str, come_back: str) -> bool:
    """Say that a run or sweep that was left goes on; whether Ctrl-C comes once more."""
    if isinstance(reason, HungUp):  # nobody is there who could
        return False
    click.echo(f"\nleft: {name} goes on. Ctrl-C once more within {AGAIN_SECONDS:.0f} s cancels it", err=True)
    click.echo(f"  come back  {come_back}\n  cancel     nemotron runs cancel {name}", err=True)
    try:
        time.sleep(AGAIN_SECONDS)
    except HungUp:
        return False
    except KeyboardInterrupt:
        return True
    return False


@contextmanager
def stop_signals() -> Iterator[None]:
    """A closed terminal or a SIGTERM ends the following as Ctrl-C does.

    Once: a terminal, its shell and `timeout` may all say it, and what was begun at the first must come to its end.
    """
    told = False

    def stop(number: int, frame: Any) -> None:
        nonlocal told
        if not told:
            told = True
            raise HungUp

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
