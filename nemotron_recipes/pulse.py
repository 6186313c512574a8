"""Whether a stage comes further, from what its ranks leave on disk: never from its log, which may lie.

Standard library only.
Each rank writes where it is (StageDir.heartbeat) after every step and around saves and evaluations. When no rank's
heartbeat and no checkpoint has moved for longer than the stage's own pace allows, the stage is stalled.

Times are seconds since the epoch by the clock of the node that wrote them; clocks that differ by more than the allowed
silence make a wrong verdict.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nemotron_recipes.rundir import TRACKER, StageDir, read_json, read_jsonl
from nemotron_recipes.seals import sealed
from nemotron_recipes.spec import Tree

DEFAULT_FACTOR = 20.0  # how many median steps nothing may move
WRITE_SECONDS = 1.0  # a heartbeat reaches the disk at most so much later
DEFAULT_MINIMUM = 120.0  # seconds; a short step says little about a slow file system
UNKNOWN_STEP = 900.0  # seconds; a process's first step, which compiles kernels and whose time nobody knows yet
UNKNOWN_SAVE = 900.0  # seconds; the first checkpoint of a large model, whose time nobody knows yet
SAVE_FACTOR = 3.0  # a later one may take this many times the slowest before it
LOG_ROWS = 3  # so many rows of the metrics without a line in the log

# What a rank is at. `starting` and `ending` take as long as they take: nothing is concluded from them.
Phase = Literal["starting", "loading", "training", "evaluating", "saving", "ending"]
_ORDER = ("loading", "training", "evaluating", "saving")


@dataclass(frozen=True)
class Beat:
    """Where a rank was at `time`. step_seconds: the median of its last steps, 0 before the first one.

    save_seconds   of its slowest checkpoint so far; 0 before the first one
    memory         bytes of its GPU that torch holds, and has held at most; None without a GPU
    """

    rank: int
    time: float
    phase: Phase
    step: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    save_seconds: float = 0.0
    memory: int | None = None
    memory_peak: int | None = None
    host: str = ""
    world: int = 1  # how many ranks there are

    def to_json(self) -> str:
        return json.dumps(sealed(asdict(self), "beat"))


@dataclass(frozen=True)
class Pulse:
    """How a stage fares. `moved`: when anything of it last did; `allowed`: for how many seconds nothing may.

    behind   the ranks that have come less far than the others; empty when all stand at the same place
    silent   the ranks whose own heartbeat is older than `allowed`
    """

    beats: tuple[Beat, ...]
    now: float
    moved: float
    allowed: float
    judged: bool
    behind: tuple[int, ...]
    silent: tuple[int, ...]

    @property
    def stalled(self) -> bool:
        return self.judged and self.now - self.moved > self.allowed

    @property
    def step(self) -> int:
        return max(beat.step for beat in self.beats)

    @property
    def steps(self) -> int:
        return max(beat.steps for beat in self.beats)

    def words(self) -> str:
        """`STALLED: nothing has moved for 312 s (120 s are allowed); last step 12 of 100; rank 1 is behind ...`"""
        head = f"nothing has moved for {self.now - self.moved:.0f} s ({self.allowed:.0f} s are allowed)"
        parts = [head, f"last step {self.step} of {self.steps}"]
        if self.behind:
            phases = sorted({beat.phase for beat in self.beats if beat.rank in self.behind})
            parts.append(f"{_ranks(self.behind)} behind the others ({', '.join(phases)})")
        parts.append(f"{_ranks(self.silent)} silent" if len(self.silent) < len(self.beats) else "all ranks are silent")
        return "STALLED: " + "; ".join(parts)


def pulse(
    stage: StageDir, attempt: int, now: float, factor: float = DEFAULT_FACTOR, minimum: float = DEFAULT_MINIMUM
) -> Pulse | None:
    """The pulse of an attempt; None where no rank has written a heartbeat (it does not train, or not with ours)."""
    beats = read_beats(stage, attempt)
    if not beats:
        return None
    allowed = max(allowance(beat, factor, minimum) for beat in beats)
    moved = max([*(beat.time for beat in beats), _tracker_time(stage)])
    # A rank that has not started yet holds up the others, however long its start takes.
    judged = len(beats) >= beats[0].world and all(beat.phase in _ORDER for beat in beats)
    places = {beat.rank: (beat.step, _ORDER.index(beat.phase)) for beat in beats} if judged else {}
    last = min(places.values(), default=None)
    behind = tuple(rank for rank, place in places.items() if place == last)
    silent = tuple(beat.rank for beat in beats if now - beat.time > allowed)
    return Pulse(beats, now, moved, allowed, judged, behind if len(behind) < len(places) else (), silent)


def allowance(beat: Beat, factor: float, minimum: float) -> float:
    """How long a rank at this place may be silent."""
    allowed = max(minimum, factor * beat.step_seconds) + WRITE_SECONDS
    if not beat.step_seconds:
        allowed += UNKNOWN_STEP
    if beat.phase == "saving":
        allowed += SAVE_FACTOR * beat.save_seconds if beat.save_seconds else UNKNOWN_SAVE
    return allowed


def read_beats(stage: StageDir, attempt: int) -> tuple[Beat, ...]:
    """Every rank's newest heartbeat, by rank."""
    found = (_read_beat(path) for path in stage.heartbeats(attempt))
    return tuple(sorted((beat for beat in found if beat), key=lambda beat: beat.rank))


def _read_beat(path: Path) -> Beat | None:
    """None of a file that a crash of its node left empty or torn: it is not synced to the disk."""
    try:
        tree = read_json(path)
        return Beat(**tree) if tree else None
    except (ValueError, TypeError):
        return None


def median(seconds: Sequence[float]) -> float:
    """0 of nothing."""
    return statistics.median(seconds) if seconds else 0.0


def log_stopped(stage: StageDir, attempt: int) -> str:
    """Words on a log that stopped while steps went on, or "": each row of the metrics has a line there."""
    log = stage.log(attempt, 0)
    if not log.is_file():
        return ""
    written = log.stat().st_mtime
    later = [row for row in read_jsonl(stage.metrics) if row.get("time", 0.0) > written + 1.0 and "loss" in row]
    if len(later) < LOG_ROWS:
        return ""
    return f"rank 0's log stopped {later[-1]['time'] - written:.0f} s ago, while steps went on to {later[-1]['step']}"


def limits_of(options: Tree) -> tuple[float, float]:
    """(factor, minimum) as a placement's options set them."""
    factor, minimum = options.get("stall_factor"), options.get("stall_seconds")
    return (
        DEFAULT_FACTOR if factor is None else float(factor),
        DEFAULT_MINIMUM if minimum is None else float(minimum),
    )


def _tracker_time(stage: StageDir) -> float:
    try:
        return (Path(stage.checkpoints) / TRACKER).stat().st_mtime
    except OSError:
        return 0.0


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {named} is" if len(ranks) == 1 else f"ranks {named} are"
