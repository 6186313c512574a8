"""Where this rank is, on disk for whoever wants to know whether it still comes further; and its stacks when asked.

The file is written by a thread, at most once a second: marking a place costs a step nothing, and a rank that hangs in
the next moment has told all the same where. Nothing here may end a stage: a full disk is for others to notice.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

from nemotron_recipes.pulse import WRITE_SECONDS, Beat, Phase, median
from nemotron_recipes.rundir import STACKS_SIGNAL, StageDir

_RECENT = 50  # steps


class Heartbeat:
    """One rank's; `mark` says where it is."""

    def __init__(self, stage: StageDir, attempt: int, rank: int, world: int):
        self.path = stage.heartbeat(attempt, rank)
        self.rank, self.world, self.host = rank, world, socket.gethostname()
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._place: tuple[Phase, int, int] = ("starting", 0, 0)
        self._time = self._began = time.time()
        self._save_seconds = 0.0
        self._news, self._over = threading.Event(), threading.Event()
        self._news.set()
        self._thread = threading.Thread(target=self._write_on, daemon=True)
        self._thread.start()

    def mark(self, phase: Phase, step: int, steps: int) -> None:
        """This rank is now at `phase`, and has done `step` of `steps` steps."""
        now = time.time()
        before, done, _ = self._place
        if step > done and before in ("training", "loading"):
            self._steps.append(now - self._began)
        if before == "saving" and phase != "saving":
            self._save_seconds = max(self._save_seconds, now - self._time)
        if phase == "loading":
            self._began = now
        self._place, self._time = (phase, step, steps), now
        self._news.set()

    def close(self) -> None:
        """Write the last place; nothing is written afterwards."""
        self._over.set()
        self._news.set()
        self._thread.join(timeout=5)
        with suppress(OSError):
            self._write()

    def _write_on(self) -> None:
        while not self._over.is_set():
            self._news.wait()
            self._news.clear()
            with suppress(OSError):
                self._write()
            self._over.wait(WRITE_SECONDS)

    def _write(self) -> None:
        phase, step, steps = self._place
        held, peak = _gpu_memory()
        beat = Beat(
            *(self.rank, round(self._time, 3), phase, step, steps, round(median([*self._steps]), 4)),
            *(round(self._save_seconds, 3), held, peak, self.host, self.world),
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(beat.to_json())
        os.replace(temporary, self.path)  # not fsynced: it is worth nothing after a crash


class Stacks:
    """Python's stacks of all threads go to the rank's file when somebody sends STACKS_SIGNAL, wherever it hangs."""

    def __init__(self, stage: StageDir, attempt: int, rank: int):
        self.path = stage.stacks(attempt, rank)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - until the process ends
        # What it is again after `unregister`: a signal that comes late must not end the process.
        signal.signal(getattr(signal, STACKS_SIGNAL), signal.SIG_IGN)
        faulthandler.register(getattr(signal, STACKS_SIGNAL), file=self._file, all_threads=True)

    def close(self) -> None:
        faulthandler.unregister(getattr(signal, STACKS_SIGNAL))
        self._file.close()
        with suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.path.parent.rmdir()  # the last rank; before, it is not empty


def _gpu_memory() -> tuple[int | None, int | None]:
    """(held now, at most) in bytes by torch on this rank's GPU; never loads torch, never wakes CUDA."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None, None
    return torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
