"""What Slurm's commands print of jobs, read into one state for each job id. Pure.

An array, or a job of several components, has several lines of one id: they are one job to whoever waits for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nemotron_recipes.errors import NemotronError

# https://slurm.schedmd.com/job_state_codes.html, and what squeue shows of flags
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_WORKING = {"RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
_WORKING |= {"EXPEDITING", "POWER_UP_NODE", "UPDATE_DB"}
_OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
_OVER |= {"PREEMPTED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"}

# Fields of `squeue --Format`: name, width. squeue cuts what is longer.
SQUEUE_FIELDS = {
    "JobArrayID": 40,
    "State": 24,
    "exit_code": 12,
    "restartcnt": 10,
    "TimeLimit": 24,
    "Reason": 64,
    "StartTime": 24,
    "NodeList": 256,
}
SACCT_FIELDS = "JobID,State,ExitCode,NodeList,Timelimit,Reason"
_NOTHING = ("None", "(null)", "None assigned", "N/A", "Unknown")


class Unclear(NemotronError):
    """Slurm says something of a job that is not known here."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job. `signal`: what ended its script, else 0. `by`: who cancelled it, where sacct knows."""

    job: str
    state: str
    exit_code: int = 0
    signal: int = 0
    reason: str = ""
    nodes: str = ""
    limit: str = ""
    by: str = ""
    restarts: int = 0  # how often it was put back into the queue, where slurmctld still knows
    details: Mapping[str, str] = field(default_factory=dict, compare=False)  # all that `scontrol show job` says
    source: str = field(default="slurmctld", compare=False)  # who says so
    accounted: str | None = field(default=None, compare=False)  # what sacct says of its state; None: not asked, or mute

    @property
    def active(self) -> bool:
        """Whether it runs or may still do so. One that waits for a job that failed never will."""
        return self.state in _WAITING | _WORKING and not self.never

    @property
    def never(self) -> bool:
        """Whether it waits for a job that has not ended as it should have: it would stay in the queue for ever."""
        return self.state == "PENDING" and self.reason == "DependencyNeverSatisfied"

    @property
    def impossible(self) -> bool:
        """Whether it asks for more than its partition has, and would wait until somebody changes one of them."""
        return self.state == "PENDING" and self.reason in (
            "PartitionConfig",
            "PartitionTimeLimit",
            "PartitionNodeLimit",
        )

    @property
    def waiting(self) -> bool:
        return self.state in _WAITING


def of_scontrol(job: str, text: str) -> JobState:
    """`scontrol --oneliner show job JOB`: a line for each of its tasks or components. Unclear: a state that is new."""
    return combined([_of_line(job, line) for line in text.splitlines() if line.strip()])


def of_squeue(text: str) -> dict[str, JobState]:
    """`squeue --noheader --Format=...` with SQUEUE_FIELDS, each ended by `|`. Unclear: a state that is new."""
    found: dict[str, list[JobState]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) <= len(SQUEUE_FIELDS):
            continue
        name, state, status, restarts, limit, reason, start, nodes = cells[: len(SQUEUE_FIELDS)]
        job = job_of(name)
        code, signal = _ended_with(status)
        said = JobState(job, _known(job, state), code, signal, _told(reason), _told(nodes), limit)
        said = replace(said, restarts=int(restarts or 0), details={"StartTime": start})
        found.setdefault(job, []).append(said)
    return {job: combined(parts) for job, parts in found.items()}


def of_sacct(text: str) -> dict[str, JobState]:
    """`sacct -X --noheader --parsable2 --format=SACCT_FIELDS`. Unclear: a state that is new."""
    found: dict[str, dict[str, JobState]] = {}
    for line in text.splitlines():
        if line.count("|") < SACCT_FIELDS.count(","):
            continue
        name, state, code, nodes, limit, reason = line.split("|")[:6]
        job = job_of(name)
        word, _, by = state.partition(" by ")
        number, signal = _ended_with(code)
        said = JobState(job, _known(job, word), number, signal, _told(reason), _told(nodes), limit, by, source="sacct")
        found.setdefault(job, {})[name] = said  # of several incarnations the newest
    return {job: combined([*parts.values()]) for job, parts in found.items()}


def combined(parts: Sequence[JobState]) -> JobState:
    """One state for a job of several parts: it works while one works, then it waits, and it has failed if one has."""
    order = (lambda p: p.state in _WORKING, lambda p: p.active, lambda p: p.waiting, lambda p: p.state != "COMPLETED")
    for fits in order:
        for part in parts:
            if fits(part):
                return part
    return parts[0]


def merged(now: Mapping[str, JobState], accounted: Mapping[str, JobState]) -> dict[str, JobState]:
    """slurmctld's word, which is never behind, with what the accounting says; of what it has forgotten the latter."""
    found = dict(accounted)
    for job, state in now.items():
        told = accounted.get(job)
        by = told.by if told is not None and told.state == state.state else ""
        found[job] = replace(state, by=by, accounted=told.state if told is not None else None)
    return found


def differs(state: JobState) -> bool:
    """Whether slurmctld and the accounting tell different things that are not two moments of the same course."""
    if state.accounted is None or state.accounted == state.state:
        return False
    pair = {state.state, state.accounted}
    return not (pair <= {"PENDING", "CONFIGURING", "REQUEUED"} or pair <= {"RUNNING", "COMPLETING"})


def _of_line(job: str, line: str) -> JobState:
    words: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Z][\w/]*)=(\S*)", line):
        words.setdefault(key, value)  # texts of the user's come after Slurm's own words
    code, signal = _ended_with(words.get("ExitCode", ""))
    reason, nodes = _told(words.get("Reason", "")), _told(words.get("NodeList", ""))
    return JobState(
        *(job, _known(job, words.get("JobState", "")), code, signal, reason, nodes, words.get("TimeLimit", "")),
        restarts=int(words.get("Restarts", "0")),
        details=words,
    )


def _known(job: str, state: str) -> str:
    if state not in _WAITING | _WORKING | _OVER:
        raise Unclear(f"Slurm calls job {job} {state!r}, a state that is not known here")
    return state


def job_of(name: str) -> str:
    """The id that sbatch named: of a task (`12_3`, `12_[4-9%1]`) or a component (`12+1`) that of the whole."""
    return re.split(r"[_+]", name, maxsplit=1)[0]


def _ended_with(text: str) -> tuple[int, int]:
    """(exit code, signal) of `1:0`, or of a wait status (`256`), which squeue prints."""
    code, colon, signal = text.partition(":")
    if colon:
        return int(code or 0), int(signal or 0)
    return divmod(int(text or 0), 256)


def _told(text: str) -> str:
    return "" if text in _NOTHING else text


def chunks(items: Iterable[str], size: int) -> list[list[str]]:
    """In pieces that fit into one argument of a command."""
    every = [*items]
    return [every[place : place + size] for place in range(0, len(every), size)]
