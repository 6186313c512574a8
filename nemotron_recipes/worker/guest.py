"""A training loop of another project as a guest in this process: how it is stopped in time, and how its end is read.

Such loops save and end after the step in which SIGTERM came, on whichever rank. So a deadline becomes a SIGTERM to this
process, early enough; and what came is seen through the wake-up descriptor, whoever holds the handlers.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from nemotron_recipes.errors import JobFailed
from nemotron_recipes.rundir import latest_checkpoint
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.deadline import deadline_from, last_save_seconds

LEAST_RESERVE = 120.0  # seconds before the deadline for a step that has begun and a save of unknown length
SAVES = 2.0  # ... or this many times the newest save
NEAR = 60.0  # a stop so close to the alarm of this rank was the alarm of another one
POLL = 2.0  # seconds between looks at the checkpoint folder


class Guest:
    """`with Guest(context) as guest: loop()`, then `guest.conclude(reached, wanted)`."""

    def __init__(self, context: Context):
        self.context = context
        self.alarm: float | None = None  # seconds since the epoch
        deadline = deadline_from(os.environ)
        if deadline is not None:
            save = last_save_seconds(context.dir, context.attempt)
            self.alarm = deadline - max(LEAST_RESERVE, SAVES * save)
        self._done = threading.Event()
        self._read, self._write = socket.socketpair()

    def __enter__(self) -> Guest:
        for end in (self._read, self._write):
            end.setblocking(False)
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self._old = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        if self.alarm is not None:
            threading.Thread(target=self._ring, name="deadline", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """A loop that leaves through `sys.exit(0)` has ended well."""
        self._done.set()
        signal.set_wakeup_fd(self._old)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        return isinstance(error, SystemExit) and not error.code

    def conclude(self, reached: int, wanted: int) -> None:
        """Tell the context why the loop ended. JobFailed: before the last step, and nobody had asked."""
        if reached >= wanted:
            return
        stopped = self._stopped()
        by_clock = self.alarm is not None and time.time() >= self.alarm - NEAR
        if not stopped and not by_clock:
            raise JobFailed(f"training ended after step {reached} of {wanted} by itself; its log says more")
        self.context.stop_seen = True
        self.context.time_is_up = by_clock
        if self.context.is_main:
            self.context.event("stopped", step=reached, reason="time-limit" if by_clock else "signal")

    def _ring(self) -> None:
        assert self.alarm is not None
        if not self._done.wait(max(0.0, self.alarm - time.time())):
            os.kill(os.getpid(), signal.SIGTERM)

    def _stopped(self) -> bool:
        try:
            return bool({signal.SIGTERM, signal.SIGINT} & set(self._read.recv(4096)))
        except BlockingIOError:
            return False


class CheckpointWatch:
    """Rank 0: says in the events when a checkpoint is whole, which is also how people see that training lives.

    look: called again and again; it may turn what the guest has written into our layout before the tracker is read.
    saw: called with each checkpoint that has become whole
    """

    def __init__(
        self,
        context: Context,
        look: Callable[[], object] = lambda: None,
        saw: Callable[[Path], object] = lambda checkpoint: None,
    ):
        self.context, self.look, self.saw = context, look, saw
        self._seen = latest_checkpoint(context.dir.checkpoints)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="checkpoints", daemon=True)

    def __enter__(self) -> CheckpointWatch:
        if self.context.is_main:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self.context.is_main:
            self._thread.join()
            self._once()

    def _watch(self) -> None:
        while not self._done.wait(POLL):
            try:
                self._once()
            except OSError as error:  # a busy file system; the next look may work, and so may the last one
                print(f"warning: the checkpoint folder can't be read: {error}", file=sys.stderr)

    def _once(self) -> None:
        self.look()
        newest = latest_checkpoint(self.context.dir.checkpoints)
        if newest is not None and newest != self._seen:
            self._seen = newest
            self.saw(newest)
            began = min((entry.stat().st_mtime for entry in newest.iterdir()), default=time.time())
            seconds = round(max(0.0, time.time() - began), 3)
            self.context.event("checkpoint-saved", step=step_of(newest), checkpoint=str(newest), seconds=seconds)


def step_of(checkpoint: os.PathLike[str]) -> int:
    """The step of an iter_NNNNNNN folder."""
    return int(os.path.basename(checkpoint).rpartition("_")[2])


def link_tree(source: os.PathLike[str], target: os.PathLike[str]) -> None:
    """The same files in another folder, without a second copy where the file system can; links are followed."""
    import shutil

    def link(a: str, b: str) -> str:
        try:
            os.link(os.path.realpath(a), b)
        except OSError:
            shutil.copy2(a, b)
        return b

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
