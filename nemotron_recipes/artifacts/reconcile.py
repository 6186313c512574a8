"""What became of a stage, from everything that anybody wrote about it. Pure.

A killed worker writes nothing, a killed launcher neither, and both may be right or wrong about the other. The rule: a
stage succeeded only when its record says so and no exit code says otherwise; where they disagree, the view says so.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any, Literal

from nemotron_recipes.spec import Liveness

State = Literal["pending", "running", "stalled", "succeeded", "failed", "cancelled", "lost", "reused"]
CANCELLED_CODE = 130


@dataclass(frozen=True)
class Evidence:
    """All that is known of the newest attempt of a stage.

    record, failure   of this attempt; an older attempt's don't count
    cancelled         the launcher wrote that it stopped this stage because somebody asked
    liveness          of the whole run; None: it was never submitted
    worker            of rank 0's own process; None: it never wrote that it started
    launched          the launcher wrote that it started this attempt (otherwise it was started by hand)
    retrying          a newer launcher is at work and hasn't come to this stage yet
    requeued          why this attempt's job went back into the queue; "" when it did not
    stopped_by        why the scheduler ended it (time limit, dead node); its processes could not know
    """

    reused: bool = False
    started: bool = False
    exit_code: int | None = None
    record: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    cancelled: bool = False
    liveness: Liveness | None = None
    worker: Literal["alive", "gone", "unknown"] | None = None
    launched: bool = True
    retrying: bool = False
    stopped_by: str = ""
    requeued: str = ""


def judge(evidence: Evidence) -> tuple[State, str]:
    """(state, note). The note names a disagreement or the gap in what is known; often empty."""
    if evidence.reused:
        return "reused", ""
    if not evidence.started:
        return ("cancelled" if evidence.cancelled else "pending"), ""
    state: State
    if evidence.stopped_by:
        state, note = "failed", evidence.stopped_by
    elif evidence.exit_code is None:
        state, note = _without_exit_code(evidence)
    elif evidence.exit_code == 0:
        state, note = _after_exit_0(evidence)
    else:
        state, note = _after_bad_exit(evidence)
    if evidence.requeued and evidence.liveness in ("queued", "running"):
        return "pending", f"back in the queue ({evidence.requeued})"
    if evidence.retrying and state in ("failed", "cancelled", "lost"):
        return "pending", f"to be tried again; the last attempt: {state}"
    return state, note


def exit_text(code: int) -> str:
    """An exit code for people: 137 is `exit code 137 (SIGKILL, often the out-of-memory killer)`."""
    try:
        name = signal.Signals(code - 128).name if code > 128 else ""
    except ValueError:
        name = ""
    extra = ", often the out-of-memory killer" if name == "SIGKILL" else ""
    return f"exit code {code}" + (f" ({name}{extra})" if name else "")


def _after_exit_0(evidence: Evidence) -> tuple[State, str]:
    if evidence.record is None:
        return "failed", "it ended with exit code 0, but rank 0 recorded no end"
    said: State = evidence.record["state"]
    return said, "" if said == "succeeded" else f"it ended with exit code 0, but its record says {said}"


def _after_bad_exit(evidence: Evidence) -> tuple[State, str]:
    assert evidence.exit_code is not None
    code, said = exit_text(evidence.exit_code), evidence.record["state"] if evidence.record else None
    if said == "succeeded":
        state: State = "cancelled" if evidence.cancelled else "failed"
        return state, f"its record says succeeded, but it ended with {code}"
    if evidence.cancelled:
        return "cancelled", ""
    if said == "cancelled" and evidence.exit_code != CANCELLED_CODE:
        return "failed", f"rank 0 was told to stop, but nobody cancelled the run: another rank must have ended; {code}"
    if said is None:
        return "failed", f"rank 0 recorded no end; {code}"
    return said, "" if said == "failed" else code


def _without_exit_code(evidence: Evidence) -> tuple[State, str]:
    if evidence.record is not None:
        said: State = evidence.record["state"]
        if said == "cancelled" and evidence.launched and evidence.liveness in ("queued", "running"):
            return "running", "it was told to stop"  # what its launcher makes of that is still to come
        if said == "succeeded" and evidence.failure is not None:
            return "failed", f"its record says succeeded, but rank {evidence.failure['rank']} failed"
        return said, ""
    if evidence.cancelled:
        return "cancelled", ""
    if _alive(evidence):
        return "running", f"rank {evidence.failure['rank']} has failed" if evidence.failure else ""
    if evidence.failure is not None:
        return "failed", "rank 0 recorded no end"
    if evidence.liveness == "ended":
        return "failed", "its launcher ended without recording how this stage ended"
    if evidence.worker == "unknown" and evidence.liveness is None:
        return "running", "it was started by hand on another machine or in a container: nothing more is known"
    return "lost", "nobody runs it any more, and nobody recorded an end"


def _alive(evidence: Evidence) -> bool:
    if evidence.liveness in ("queued", "running"):
        return True
    by_hand = not evidence.launched or evidence.liveness is None  # then the executor can't know of it
    return by_hand and evidence.worker == "alive"
