"""One rank of one attempt of a stage, from the worker file to the record.

The order of effects: log, `started`, inputs resolved and verified, the module's `run`, outputs registered, `finished`,
record. The record comes last: what it says has happened. A process that is killed writes none of this; readers put
the truth together from what is there (artifacts/records.py).
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import platform
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from nemotron_recipes.artifacts.owner import this_process
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import Cancelled, JobFailed, NemotronError, Problem, Unfinished, UserError
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.mirror.sync import follow
from nemotron_recipes.rundir import RANKS_HERE_ENV, latest_checkpoint, read_json, read_jsonl, write_record, write_sealed
from nemotron_recipes.spec import Artifact, Producer
from nemotron_recipes.worker import room
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.facts import collect
from nemotron_recipes.worker.heartbeat import Heartbeat, Stacks
from nemotron_recipes.worker.inputs import resolve_inputs
from nemotron_recipes.worker.logs import RankLog
from nemotron_recipes.worker.trainer_wandb import find_trainer_run, point
from nemotron_recipes.worker.workerfile import REGISTRY, WorkerFile, attempt_from, load_worker_file, ranks_from

LIBRARIES = (
    "nemotron-recipes",
    "megatron-bridge",
    "megatron-core",
    "nemo-automodel",
    "torch",
    "transformers",
    "trl",
    "peft",
    "unsloth",
    "unsloth_zoo",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
)
ERROR_LINES = 20  # last lines of a traceback that go into the failure file
POLL = 0.05  # seconds between looks at what other ranks have written
ECHO = 2.0  # seconds; torchrun and the launcher may both pass on one and the same wish to stop


def main(argv: list[str] | None = None) -> int:
    """Run this rank; returns the exit code: 0 done, 1 failed, 2 wrong request, 75 saved but not done, 130 cancelled."""
    parser = argparse.ArgumentParser(prog="python -m nemotron_recipes.worker", description="Run one rank of a stage.")
    parser.add_argument("--config", required=True, metavar="FILE", type=Path, help="the stage's worker file")
    parser.add_argument("--foreground", action="store_true", help="show rank 0 here too, also without a terminal")
    options = parser.parse_args(argv)
    try:
        file = load_worker_file(options.config)
        ranks = ranks_from(os.environ)
        attempt = attempt_from(os.environ, file.dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    log = RankLog(file.dir.log(attempt, ranks.rank), show=ranks.rank == 0 and (options.foreground or os.isatty(1)))
    log.open()
    try:
        context = Context(
            rank=ranks.rank,
            world_size=ranks.world_size,
            local_rank=ranks.local_rank,
            attempt=attempt,
            dir=file.dir,
            run=file.run,
            store=Store(Path(file.run["store"])),
            declared=file.outputs,
        )
        context.heartbeat = Heartbeat(file.dir, attempt, ranks.rank, ranks.world_size)
        stacks = Stacks(file.dir, attempt, ranks.rank)
        try:
            return Attempt(file, context, log).run()
        finally:
            stacks.close()
            context.heartbeat.close()
    finally:
        log.close()


class Attempt:
    """The life of one rank: `run` does it all and never raises for what went wrong in the stage."""

    def __init__(self, file: WorkerFile, context: Context, log: RankLog):
        self.file = file
        self.context = context
        self.log = log
        self.started = time.time()
        self.outputs: dict[str, Artifact] = {}
        self._pid = os.getpid()
        self._ending = False
        self._first_signal: float | None = None

    def run(self) -> int:
        """Run, register, record; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._begin()
            self._work()
        except BaseException as error:  # noqa: BLE001  the outermost boundary: whatever it is, it is recorded
            return self._end_badly(error)
        return self._end_well()

    def _begin(self) -> None:
        context = self.context
        context.dir.failure(context.attempt, context.rank).unlink(missing_ok=True)  # torchrun restarted this attempt
        if context.is_main:
            stale = context.dir.record
            if (read_json(stale) or {}).get("attempt") == context.attempt:
                stale.unlink()
        context.event("started", world_size=context.world_size, **this_process())
        if context.is_main:
            write_sealed(context.dir.environment(context.attempt), collect(), kind="environment")
        began = time.monotonic()
        context.inputs, context.artifacts = resolve_inputs(self.file.inputs, context.store, verify=context.is_main)
        labels = {key: artifact.label for key, artifact in context.artifacts.items()}
        context.event("inputs-verified", inputs=labels, seconds=round(time.monotonic() - began, 3))
        if context.is_main:
            self._mirror(lambda to: to.started(context.run["stage"], context.attempt, self._parents()))
            self._mirror(lambda to: follow(to.run_dir, os.getpid()))

    def _work(self) -> None:
        context = self.context
        name, extra = REGISTRY[self.file.worker]
        self._mirror(lambda _: self._point_trainer())
        try:
            importlib.import_module(name).run(self.file.config, context)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "nemotron_recipes":
                raise
            image = "use an image that has it"
            fix = f"pip install 'nemotron-recipes[{extra}]', or {image}" if extra else image
            raise UserError(Problem(f"this stage needs the package '{error.name}'", sys.executable, fix)) from error
        if context.is_main:
            self._wait_for_the_other_ranks()
        if context.time_is_up:
            raise Unfinished("the time is nearly up: what was reached is saved")
        if context.stop_seen:
            raise Cancelled("stopped when asked to")
        self._ending = True  # from here on a first signal comes too late to undo anything
        if not context.is_main:
            return
        missing = sorted(set(context.declared) - set(context.staged))
        if missing:
            raise JobFailed(f"the stage ended without writing its outputs: {', '.join(missing)}")
        for slot, declared in context.declared.items():
            self.outputs[slot] = context.store.commit(
                context.staged[slot],
                kind=declared.kind,
                producer=self._producer(slot),
                attempt=context.attempt,
                parents=context.artifacts,
                metadata=context.metadata,
                results=_finite(context.results),
                config=self.file.config,
            )
            context.event("registered", slot=slot, artifact=self.outputs[slot].label)
            made = self.outputs[slot]
            version = made.version or 0
            self._mirror(
                partial(Journal.output, stage=context.run["stage"], slot=slot, name=made.name, version=version)
            )

    def _end_well(self) -> int:
        self.context.event("finished", seconds=round(time.time() - self.started, 3))
        if self.context.is_main:
            self._record("succeeded", 0)
            made = "".join(f"\n  {slot}: {artifact.uri}" for slot, artifact in self.outputs.items())
            self.log.say_outside(f"succeeded{made}\n  log: {self.log.path}")
        return 0

    def _wait_for_the_other_ranks(self) -> None:
        """Until all have started: in a start by hand a rank counts its attempt on from the record, so it must not
        find this one's. A rank that never starts is the launcher's to notice, which then stops this one. Ranks with a
        folder of their own, on other hosts, don't count: theirs may come here later, or never."""
        context = self.context
        number = int(os.environ.get(RANKS_HERE_ENV) or context.world_size)
        waiting = [context.dir.events(context.attempt, rank) for rank in range(1, number)]
        while waiting and not context.stop_signal:
            waiting = [path for path in waiting if next(read_jsonl(path), None) is None]
            time.sleep(POLL if waiting else 0)

    def _end_badly(self, error: BaseException) -> int:
        """Say what happened in the log, the events, a failure file and the record, as far as the disk allows."""
        self._ending = True
        context = self.context
        error = self._make_room(error)
        unfinished = isinstance(error, Unfinished)
        # An error after the signal follows from it.
        cancelled = not unfinished and (isinstance(error, Cancelled) or context.stop_signal)
        code = Cancelled.exit_code if cancelled else _exit_code(error)
        word = "unfinished" if unfinished else "cancelled" if cancelled else "failed"
        text = str(error) if isinstance(error, NemotronError) else f"{type(error).__name__}: {error}"
        if isinstance(error, NemotronError):
            lines = text.splitlines()
            _say(f"{'error' if word == 'failed' else word}: {text}")
        else:
            lines = "".join(traceback.format_exception(error)).splitlines()
            _say("\n".join(lines))
        how = "failed" if word == "failed" else "stopped"
        self.log.say_outside(f"rank {context.rank} {how}: {text}\n  log: {self.log.path}")
        failure = {
            "time": time.time(),
            "rank": context.rank,
            "host": socket.gethostname(),
            "error": type(error).__name__,
            "message": text,
            "exit_code": code,
            "lines": lines[-ERROR_LINES:],
        }
        for staged in context.staged.values():
            context.store.discard(staged)
        try:
            if word == "failed":
                write_sealed(context.dir.failure(context.attempt, context.rank), failure, kind="failure")
            if context.is_main and not unfinished:  # the record is the stage's last word, and it goes on
                self._record(word, code, text)
            context.event(word, error=text, exit_code=code)
        except OSError as disk:
            _say(f"error: this end can't be recorded: {disk}")
        return code

    def _make_room(self, error: BaseException) -> BaseException:
        """On a full disk unfinished work goes first, so that the end can be recorded; then it is said in words."""
        context = self.context
        if isinstance(error, (NemotronError, KeyboardInterrupt, SystemExit)):
            return error
        full = room.full_folder(error, (context.dir.path, context.store.root))
        if full is None:
            return error
        said = room.in_words(full, latest_checkpoint(context.dir.checkpoints))
        for folder in context.expendable:
            shutil.rmtree(folder, ignore_errors=True)
        for staged in context.staged.values():
            context.store.discard(staged)
        return JobFailed(said)

    def _record(self, state: str, code: int, error: str | None = None) -> None:
        """Rank 0's last word. Another rank's earlier failure explains why this one was stopped or fell."""
        context = self.context
        rank = context.rank if state == "failed" else None
        first = context.dir.first_failure(context.attempt) if state != "succeeded" else None
        if first is not None:
            state, code, error, rank = "failed", first["exit_code"], first["message"], first["rank"]
        outputs = {
            slot: {"name": a.name, "version": a.version, "digest": a.digest, "uri": a.uri}
            for slot, a in self.outputs.items()
        }
        write_record(
            context.dir,
            {
                "run": context.run["id"],
                "stage": context.run["stage"],
                "attempt": context.attempt,
                "fingerprint": context.run["fingerprint"],
                "state": state,
                "exit_code": code,
                "started": round(self.started, 3),
                "ended": round(time.time(), 3),
                "parents": self._parents(),
                "outputs": outputs,
                "results": _finite(context.results),
                "facts": context.facts,
                "error": error,
                "rank": rank,
                "host": socket.gethostname(),
                "world_size": context.world_size,
                "python": platform.python_version(),
                "versions": _versions(),
            },
        )

        results = _finite(context.results)
        self._mirror(lambda to: to.ended(context.run["stage"], context.attempt, state, code, results))

    def _mirror(self, note: Callable[[Journal], object]) -> None:
        """Note something for W&B; nothing that goes wrong with that may end a stage."""
        journal = Journal(self.file.dir.path.parent)
        try:
            if journal.target is not None:
                note(journal)
        except (OSError, ValueError, TypeError, KeyError) as error:
            print(f"warning: W&B will not be told: {error}", file=sys.stderr)

    def _point_trainer(self) -> None:
        """The trainer's own W&B logging goes to the stage's run."""
        self.context.wandb = find_trainer_run(self.file.dir, self.context.run["id"], self.context.run["stage"])
        point(self.context.wandb)

    def _parents(self) -> list[dict[str, Any]]:
        return [{"input": key, **asdict(artifact)} for key, artifact in self.context.artifacts.items()]

    def _producer(self, slot: str) -> Producer:
        run = self.context.run
        return Producer(run["fingerprint"], run["id"], run["stage"], slot)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first wish to stop is polite, the second one ends this process at once."""
        name = signal.Signals(number).name
        if os.getpid() != self._pid:  # a forked child (data loading) inherited this handler; it just dies
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            self.context.stop_signal = True
            self.context.event("stop-requested", signal=name)
            if not self.context.stop_watched and not self._ending:
                raise Cancelled(f"stopped by {name}")
        elif now - self._first_signal > ECHO:
            if self.context.is_main:
                self._record("cancelled", Cancelled.exit_code, f"stopped at once by a second {name}")
            os._exit(Cancelled.exit_code)


def _say(text: str) -> None:
    """Into this rank's log; where even that finds no room, the exit code must speak."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, NemotronError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code:
        return error.code
    return 1


def _finite(results: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN or infinity: such a result is kept by name, as null. Counts stay whole numbers."""
    numbers = {name: value if isinstance(value, int) else float(value) for name, value in results.items()}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
