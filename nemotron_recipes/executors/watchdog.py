"""A launcher's look at its stage: when it stalls, every node collects its ranks' stacks, then all of them act.

The first node's launcher judges (nemotron_recipes.pulse) and leaves a wish in the run folder, which the launchers of
all nodes heed. Nobody acts before the first one has waited for the stacks. Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.pulse import pulse
from nemotron_recipes.rundir import RUN_ID_ENV, STACKS_SIGNAL, RunDir, StageDir, append_event, read_json

LOOK_SECONDS = 2.0
STACKS_SECONDS = 15.0  # for the ranks of all nodes to write their stacks
KILL_SECONDS = 10.0  # after SIGTERM, which a rank that hangs seldom hears

_SIGNAL = getattr(signal, STACKS_SIGNAL)


@dataclass
class Watchdog:
    """One node's. `action`: dump, cancel or requeue; the first node's `look` judges, the others' only heed."""

    action: str
    factor: float
    minimum: float
    run: RunDir
    stage: StageDir
    name: str
    attempt: int
    first: bool
    heeded: float = 0.0  # the newest wish that this node has seen
    told: float = 0.0  # when what stalled had moved last, so that one stall is one wish
    ranks: list[int] = field(default_factory=list)

    @property
    def wish(self) -> Path:
        return self.stage.logs(self.attempt) / "watchdog.json"

    def look(self, launched: int) -> str:
        """Judge, heed; words on the stall when the processes below pid `launched` must be stopped for it, else ""."""
        now = time.time()
        if self.first:
            self._judge(now)
        wish = read_json(self.wish)
        if wish is None:
            return ""
        if wish["time"] > self.heeded:
            self.heeded = wish["time"]
            dump_stacks(launched, self.run_id)
            if self.first:
                self._collect(now)
                wish["act"] = self.action != "dump"
                write_atomic(self.wish, json.dumps(wish))
        return str(wish["words"]) if wish["act"] else ""

    @property
    def run_id(self) -> str:
        return str((read_json(self.run.plan) or {}).get("id", ""))

    def _judge(self, now: float) -> None:
        found = pulse(self.stage, self.attempt, now, self.factor, self.minimum)
        if found is None or not found.stalled or found.moved <= self.told:
            return
        self.told = found.moved
        self.ranks = [beat.rank for beat in found.beats]
        words = found.words()
        append_event(self.run.events, "stalled", stage=self.name, attempt=self.attempt, words=words, action=self.action)
        write_atomic(self.wish, json.dumps({"time": now, "words": words, "act": False}))

    def _collect(self, since: float) -> None:
        """Wait for every rank's stacks, and say whose came: who does not answer is stopped, or its node is dead."""
        deadline = time.monotonic() + STACKS_SECONDS
        answered: list[int] = []
        while time.monotonic() < deadline and len(answered) < len(self.ranks):
            time.sleep(0.2)
            answered = [rank for rank in self.ranks if _newer(self.stage.stacks(self.attempt, rank), since)]
        mute = [rank for rank in self.ranks if rank not in answered]
        folder = str(self.stage.stacks(self.attempt, 0).parent)
        found = {"ranks": answered, "mute": mute, "folder": folder}
        append_event(self.run.events, "stacks", stage=self.name, attempt=self.attempt, **found)


def dump_stacks(launched: int, run_id: str) -> None:
    """Ask every process of the run below `launched` that knows the signal to write its stacks."""
    for pid in descendants(launched):
        if _heeds(pid) and _is_of(pid, run_id):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, _SIGNAL)


def kill_tree(launched: int) -> None:
    """SIGKILL to a process and everything below it."""
    for pid in [*descendants(launched), launched]:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, by what /proc says of their parents."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, IndexError, ValueError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, level = [], [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def _heeds(pid: int) -> bool:
    """Whether the process has a handler for the signal, which would end any other one."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (int(_SIGNAL) - 1) & 1)
    return False


def _is_of(pid: int, run_id: str) -> bool:
    """Whether the process is a rank of that run."""
    with suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return f"{RUN_ID_ENV}={run_id}".encode() in variables
    return False


def _newer(path: Path, since: float) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_size > 0 and status.st_mtime >= since - 1.0
