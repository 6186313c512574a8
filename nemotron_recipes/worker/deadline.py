"""When to save and stop so that the work is safe before the allocation ends. Pure; times are seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.rundir import DEADLINE_ENV, StageDir, read_jsonl

RECENT_STEPS = 10


def deadline_from(environment: Mapping[str, str]) -> float | None:
    """$NEMOTRON_DEADLINE, seconds since the epoch; None without one."""
    text = environment.get(DEADLINE_ENV)
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(Problem(f"{DEADLINE_ENV}='{text}' isn't a time in seconds", "environment")) from None


def last_save_seconds(stage: StageDir, attempt: int) -> float:
    """How long the newest save of the attempts before took; 0 where nobody knows."""
    for earlier in range(attempt - 1, 0, -1):
        events = read_jsonl(stage.events(earlier, 0))
        if found := [event["seconds"] for event in events if event["event"] == "checkpoint-saved"]:
            return float(found[-1])
    return 0.0


class Pace:
    """How long a step, an evaluation and a save take here, and so whether one more step fits before the deadline.

    Times given are of the wall clock (seconds since the epoch), as the deadline is.
    """

    def __init__(self, deadline: float | None, save_seconds: float = 0.0):
        self.deadline = deadline
        self.save_seconds = save_seconds
        self.evaluation_seconds = 0.0
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._mark = 0.0

    def began(self, now: float) -> None:
        self._mark = now

    def step_done(self, now: float) -> None:
        self._steps.append(now - self._mark)
        self._mark = now

    def evaluated(self, now: float) -> None:
        self.evaluation_seconds, self._mark = now - self._mark, now

    def saved(self, now: float) -> float:
        """Returns how long that took, from the end of the step or of the evaluation."""
        self.save_seconds, self._mark = now - self._mark, now
        return self.save_seconds

    def must_stop(self, now: float) -> bool:
        """Whether one more step, as slow as the slowest recent one, could end too late to be saved in time."""
        if self.deadline is None:
            return False
        return now + max(self._steps, default=0.0) + self.evaluation_seconds + self.save_seconds >= self.deadline
