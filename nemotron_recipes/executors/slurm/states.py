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
    "EndTime": 24,
    "NodeList": 256,
}
SACCT_FIELDS = "JobID,State,ExitCode,NodeList,Timelimit,Reason,End"
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
    end: str = field(default="", compare=False)  # when it ended, or is expected to, as Slurm writes it
    told: Mapping[str, str] = field(default_factory=dict, compare=False)  # who was asked -> the state that they say

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

    @property
    def over(self) -> bool:
        return self.state in _OVER


def of_scontrol(job: str, text: str) -> JobState:
    """`scontrol --oneliner show job JOB`: a line for each of its tasks or components. Unclear: a state that is new."""
    parts = [_of_line(job, line) for line in text.splitlines() if line.strip()]
    if not parts:
        raise Unclear(f"scontrol printed nothing of job {job}")
    return combined(parts)


def of_squeue(text: str) -> dict[str, JobState]:
    """`squeue --noheader --Format=...` with SQUEUE_FIELDS, each ended by `|`. Unclear: a state that is new."""
    found: dict[str, list[JobState]] = {}
    for line in filter(str.strip, text.splitlines()):
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) <= len(SQUEUE_FIELDS):
            raise Unclear(f"squeue printed {len(cells) - 1} columns, not {len(SQUEUE_FIELDS)}: {line!r}")
        name, state, status, restarts, limit, reason, start, end, nodes = cells[: len(SQUEUE_FIELDS)]
        job = job_of(name)
        code, signal = _ended_with(status)
        said = JobState(job, _known(job, state), code, signal, _told(reason), _told(nodes), limit)
        said = replace(said, restarts=int(restarts or 0), details={"StartTime": start}, end=end)
        found.setdefault(job, []).append(replace(said, told={"slurmctld": state}))
    return {job: combined(parts) for job, parts in found.items()}


def of_sacct(text: str) -> dict[str, JobState]:
    """`sacct -X --noheader --parsable2 --format=SACCT_FIELDS`. Unclear: a state that is new."""
    found: dict[str, dict[str, JobState]] = {}
    for line in filter(str.strip, text.splitlines()):
        if line.count("|") < SACCT_FIELDS.count(","):
            raise Unclear(f"sacct printed {line.count('|') + 1} columns, not {SACCT_FIELDS.count(',') + 1}: {line!r}")
        name, state, code, nodes, limit, reason, end = line.split("|")[:7]
        job = job_of(name)
        word, _, by = state.partition(" by ")
        number, signal = _ended_with(code)
        said = JobState(job, _known(job, word), number, signal, _told(reason), _told(nodes), limit, by)
        said = replace(said, end=end, told={"sacct": word})
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
    """What slurmctld and the accounting say together, by job; either may not know of one."""
    return {**accounted, **{job: agreed(state, accounted.get(job)) for job, state in now.items()}}


def agreed(now: JobState, accounted: JobState | None) -> JobState:
    """How a job ended is the accounting's word. Until that knows of this end, the word is slurmctld's.

    The accounting is told of everything seconds later; of a job that went back into the queue it may still show how
    the attempt before ended. So its word counts where its end is at the same moment as slurmctld's. The exit code is
    slurmctld's: sacct takes 128 away from those that are greater.
    """
    if accounted is None:
        return now
    told = {**now.told, **accounted.told}
    if now.over and accounted.over and now.end == accounted.end:
        return replace(now, state=accounted.state, by=accounted.by, told=told)
    return replace(now, told=told)


def differs(state: JobState) -> bool:
    """Whether slurmctld and the accounting tell different things that are not two moments of the same course."""
    pair = {*state.told.values()}
    return len(pair) > 1 and not (pair <= {"PENDING", "CONFIGURING", "REQUEUED"} or pair <= {"RUNNING", "COMPLETING"})


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
        end=words.get("EndTime", ""),
        told={"slurmctld": words.get("JobState", "")},
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
