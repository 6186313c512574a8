"""Shards over processes. Results are files, so the order in which they come doesn't matter.

Processes are spawned: a fork would take over threads and locks of the tokenizer library. A process ends when its pipe
to this one closes, so that none outlives a run that was killed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nemotron_recipes.data.shard_encoder import Done, Recipe, ShardEncoder
from nemotron_recipes.data.shards import Shard
from nemotron_recipes.errors import JobFailed, UserError


@dataclass(frozen=True)
class Task:
    """A shard whose spool is to be written. `number`: its place in input order."""

    number: int
    shard: Shard
    base: str  # what its spool follows from, besides its content


def usable_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_here(encoder: ShardEncoder, tasks: Sequence[Task], root: Path) -> Generator[tuple[Task, Done], None, None]:
    """One after another in this process."""
    for task in tasks:
        done = _guarded(task, encoder, root)
        yield task, done
        if done.bad_rows and encoder.recipe.settings.on_bad_row == "fail":
            return


def run_parallel(
    recipe: Recipe, tasks: Sequence[Task], root: Path, workers: int
) -> Generator[tuple[Task, Done], None, None]:
    """As they finish. They are begun in order, and none after one with bad rows where those end the run. Closing the
    iterator ends the processes. UserError, JobFailed: of the earliest shard that failed among those that were begun."""
    context = get_context("spawn")
    left = list(reversed(tasks))
    busy: dict[Connection, Task] = {}
    processes: dict[Connection, Any] = {}
    failures: list[tuple[int, Exception]] = []
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, recipe, root), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            _give(ours, left.pop(), busy)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                task = busy.pop(ready)
                try:
                    outcome = ready.recv()
                except (EOFError, ConnectionResetError):
                    outcome = _died(processes[ready], task)
                if isinstance(outcome, Exception):
                    failures.append((task.number, outcome))
                    continue
                if outcome.bad_rows and recipe.settings.on_bad_row == "fail":
                    left.clear()
                if left and not failures:
                    _give(ready, left.pop(), busy)
                yield task, outcome
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]
    finally:
        for connection, process in processes.items():
            process.kill()
            connection.close()
        for process in processes.values():
            process.join()


def _give(connection: Connection, task: Task, busy: dict[Connection, Task]) -> None:
    busy[connection] = task
    with suppress(BrokenPipeError):  # the process has died: the next read says so
        connection.send(task)


def _serve(connection: Connection, recipe: Recipe, root: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    encoder: ShardEncoder | None = None
    try:
        while True:
            task: Task = connection.recv()
            try:
                encoder = encoder or ShardEncoder(recipe)
                connection.send(_guarded(task, encoder, root))
            except (UserError, JobFailed) as error:
                connection.send(error)
    except (EOFError, BrokenPipeError):
        return  # the run has ended


def _guarded(task: Task, encoder: ShardEncoder, root: Path) -> Done:
    """What a full disk and too little memory are called."""
    try:
        return encoder.run(task.shard, root, task.base)
    except OSError as error:
        raise JobFailed(f"{task.shard.name}: its tokens can't be written: {error}; what is done stays done") from None
    except MemoryError:
        raise JobFailed(f"{task.shard.name}: not enough memory for data.workers processes; set fewer") from None


def _died(process: Any, task: Task) -> Exception:
    process.join()
    code = process.exitcode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return JobFailed(f"the process that prepared {task.shard.name} {how}{hint}; run again, what is done stays done")
