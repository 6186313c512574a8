"""Runs as they stand now, and what one can ask of them or do to them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.records import Ask, RunView, Settle, load_run, load_runs, run_folders
from nemotron_recipes.executors import Executor, Liveness, get_executor
from nemotron_recipes.executors.remote import sites, transport
from nemotron_recipes.lifecycle.reach import at, refresh
from nemotron_recipes.rundir import RunDir, read_json
from nemotron_recipes.spec import JobHandle, Outlook, Tree, Wait

OPEN = ("running", "stalled", "pending", "lost")


def cancel(handle: JobHandle) -> None:
    """Stop a run and everything that it started."""
    with at(handle) as executor:
        executor.cancel(handle)
    refresh(handle)


def liveness(handle: JobHandle) -> Liveness:
    """Whether anybody still runs it, as the run's own executor says."""
    with at(handle) as executor:
        return executor.liveness(handle)


def detaches(handle: JobHandle) -> bool:
    """Whether whoever follows the run may leave it running by Ctrl-C; otherwise that stops it."""
    return get_executor(handle.executor).detaches


def ask_seconds(handle: JobHandle) -> float:
    """How often at most its executor should be asked by somebody who waits for long."""
    return get_executor(handle.executor).ask_seconds


def look(handle: JobHandle) -> Outlook:
    """What the executor says of the run and its jobs."""
    with at(handle) as executor:
        return executor.look(handle)


def waits(handle: JobHandle) -> list[Wait]:
    """Why jobs of the run have not started."""
    with at(handle) as executor:
        return executor.waits(handle)


def differences(handle: JobHandle) -> list[str]:
    """Where the sources disagree about the run."""
    with at(handle) as executor:
        return executor.differences(handle)


def left_behind(handle: JobHandle) -> list[str]:
    """What the run, which has ended, may have left running."""
    return get_executor(handle.executor).left_behind(handle)


def shell(handle: JobHandle, stage: str, command: Sequence[str]) -> list[str]:
    """argv that runs a command where a stage runs."""
    with at(handle) as executor:
        return executor.shell(handle, stage, command)


def load(run_dir: Path) -> RunView:
    """One run as it stands now. UserError when there is no such run."""
    with suppress(ValueError):  # damaged: the run is shown with that
        handle = read_json(RunDir(run_dir).handle)
        if handle:
            refresh(JobHandle(**handle))
    return _tidied(load_run(run_dir, liveness, _settle))


def newest_runs(root: Path, number: int | None) -> list[RunView]:
    """The newest runs below `root` (None: all), newest first. A scheduler is asked once for all of its runs."""
    return load_all(run_folders(root, number))


def load_all(run_dirs: Sequence[Path]) -> list[RunView]:
    """These runs as they stand now, newest first; a scheduler is asked once for all of its runs."""
    asked: dict[tuple[str, Any], Executor] = {}

    def whose(handle: JobHandle) -> tuple[str, Any]:
        return handle.executor, sites.login_in(handle)

    def together(handles: list[JobHandle]) -> tuple[Ask, Settle]:
        for handle in handles:
            refresh(handle)
        for key in {whose(handle): handle for handle in handles}:
            group = [handle for handle in handles if whose(handle) == key]
            with transport.through(sites.of_handle(group[0])):
                asked[key] = get_executor(key[0]).together(group)
        return liveness_of, settle

    def liveness_of(handle: JobHandle) -> Liveness:
        with transport.through(sites.of_handle(handle)):
            return asked[whose(handle)].liveness(handle)

    def settle(handle: JobHandle) -> list[Tree]:
        with transport.through(sites.of_handle(handle)):
            return asked[whose(handle)].settle(handle)

    def compared(view: RunView) -> RunView:
        if view.handle is None or whose(view.handle) not in asked or view.state not in OPEN:
            return view
        with transport.through(sites.of_handle(view.handle)):
            return replace(view, differences=tuple(asked[whose(view.handle)].differences(view.handle)))

    return [_tidied(compared(view)) for view in load_runs(run_dirs, together)]


def _tidied(view: RunView) -> RunView:
    """Nothing of a run that has failed stays in a queue for ever: whoever looks at it next takes it away."""
    if view.handle is None or view.state not in ("failed", "cancelled", "lost"):
        return view
    with transport.through(sites.of_handle(view.handle)):
        executor = get_executor(view.handle.executor)
        found = [*executor.tidy(view.handle), *executor.left_behind(view.handle)]
    return replace(view, differences=(*view.differences, *found))


def _settle(handle: JobHandle) -> list[Tree]:
    with at(handle) as executor:
        found = executor.settle(handle)
    refresh(handle)
    return found
