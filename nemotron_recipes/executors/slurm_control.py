"""Slurm's own commands, asked without a shell and never for long: sbatch, scontrol, sacct, squeue, scancel."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from nemotron_recipes.errors import NemotronError, Problem, UserError

_ASK_SECONDS = 20.0  # slurmctld answers in milliseconds; a dead one is noticed by the commands after their own time-out
_SUBMIT_SECONDS = 120.0
_SLOW_SECONDS, _REST_SECONDS = 1.0, 3.0
_silent: dict[str, float] = {}  # command -> until when it is not worth another try (time.monotonic)

# https://slurm.schedmd.com/sacct.html#SECTION_JOB-STATE-CODES
_ACTIVE = {"PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUED", "RESIZING", "SIGNALING"}
_ACTIVE |= {"STAGE_OUT", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "STOPPED"}

# Slurm's commands take options from these; what a job gets is what the script and the command say, nothing unseen.
_OPTIONS_IN_ENVIRONMENT = ("SBATCH_", "SRUN_", "SALLOC_", "SLURM_")


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

    @property
    def active(self) -> bool:
        """Whether it runs or may still do so. One that waits for a job that failed never will."""
        return self.state in _ACTIVE and self.reason != "DependencyNeverSatisfied"

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
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")


_TIMES = {"SLURM_TIME_FORMAT": "%s"}  # else as the user's own environment and time zone have it

# How Slurm's commands say that nobody answers: no slurm.conf, no slurmctld, no reply within MessageTimeout.
_NOBODY_ANSWERS = ("Could not establish a configuration source", "Unable to contact slurm controller", "timed out")


class Unreachable(NemotronError):
    """Slurm can't be asked from here, or does not answer now."""


class Refused(NemotronError):
    """A command of Slurm's failed; the message is its own words."""


def sbatch(argv: Iterable[str], cwd: str, environ: Mapping[str, str]) -> str:
    """Submit; the job's id. Refused with sbatch's own words."""
    said = _run([*argv], _SUBMIT_SECONDS, environ, cwd)
    found = re.search(r"^(?:Submitted batch job )?(\d+)(?:;\S+)?\s*$", said, re.MULTILINE)
    if not found:
        raise Refused(f"sbatch named no job: {said.strip()!r}")
    return found[1]


def job_state(job: str) -> JobState | None:
    """What Slurm knows of a job; None when it knows of none. Unreachable when it can't be asked.

    slurmctld first: it knows at once what reaches the database seconds later, and it answers without accounting. It
    forgets a job after MinJobAge (five minutes, unless the site says otherwise).
    """
    try:
        state = _of_scontrol(job, _question(["scontrol", "--oneliner", "show", "job", job]))
    except Refused as error:
        if "Invalid job id" not in str(error):
            raise Unreachable(str(error)) from None
        return _of_sacct(job)
    if state.state == "CANCELLED" or state.state == "NODE_FAIL":
        told = _of_sacct(job)  # it also names who cancelled
        if told is not None and told.state == state.state:
            return replace(state, by=told.by)
    return state


def answer(*argv: str) -> str:
    """What one of Slurm's commands prints; patient, as for a submission. Unreachable: it refuses, or nobody answers."""
    try:
        return _question([*argv], _SUBMIT_SECONDS)
    except Refused as error:
        raise Unreachable(f"{argv[0]}: {error}") from None


def ask(*argv: str) -> str:
    """What one of Slurm's commands prints; times as seconds since the epoch. "" where it refuses or nobody answers."""
    try:
        return _question([*argv])
    except (Refused, Unreachable):
        return ""


def accounted(job: str) -> JobState | None:
    """What the accounting alone says of a job; None when there is none, or none of this job."""
    return _of_sacct(job)


def jobs_named(name: str) -> list[str]:
    """Ids of this user's unfinished jobs of that name; [] when Slurm can't be asked."""
    argv = ["squeue", "--noheader", "--format=%A", f"--name={name}", f"--user={os.getuid()}"]
    try:
        return _run(argv, _ASK_SECONDS).split()
    except (Refused, Unreachable):
        return []


def scancel(jobs: Iterable[str]) -> None:
    """Ask for the end of jobs; of those that are over nothing is said."""
    jobs = [*jobs]
    if jobs:
        _run(["scancel", "--quiet", *jobs], _ASK_SECONDS)


def submitting_environment(environ: Mapping[str, str], secrets: Iterable[str]) -> dict[str, str]:
    """What sbatch, and so the job, inherits: all but secrets and options of Slurm's commands."""
    secrets = {*secrets}
    return {
        name: value
        for name, value in environ.items()
        if name not in secrets and (name == "SLURM_CONF" or not name.startswith(_OPTIONS_IN_ENVIRONMENT))
    }


def _run(argv: list[str], seconds: float, environ: Mapping[str, str] | None = None, cwd: str | None = None) -> str:
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=dict(environ) if environ is not None else None,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        raise Unreachable(f"{argv[0]} is not on the PATH of this machine") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{argv[0]} did not answer within {seconds:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"{argv[0]} ended with {done.returncode}"
        if any(words in said for words in _NOBODY_ANSWERS):
            raise Unreachable(said.splitlines()[-1])
        raise Refused(said)
    return done.stdout


def _question(argv: list[str], seconds: float = _ASK_SECONDS) -> str:
    """Ask. Who has just kept us waiting for nothing is not asked again for a moment: a list of runs asks for many."""
    command, now = argv[0], time.monotonic()
    if now < _silent.get(command, 0.0):
        raise Unreachable(f"{command} did not get an answer a moment ago")
    try:
        return _run(argv, seconds, {**os.environ, **_TIMES})
    except Unreachable:
        if time.monotonic() - now > _SLOW_SECONDS:
            _silent[command] = time.monotonic() + _REST_SECONDS
        raise


def _of_scontrol(job: str, text: str) -> JobState:
    words: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Z][\w/]*)=(\S*)", text):
        words.setdefault(key, value)  # texts of the user's come after Slurm's own words
    code, _, number = words.get("ExitCode", "0:0").partition(":")
    reason = words.get("Reason", "").replace("None", "")
    nodes = words.get("NodeList", "").replace("(null)", "")
    return JobState(
        *(job, words.get("JobState", ""), int(code), int(number or 0), reason, nodes, words.get("TimeLimit", "")),
        restarts=int(words.get("Restarts", "0")),
        details=words,
    )


def _of_sacct(job: str) -> JobState | None:
    """None when there is no accounting, or none of this job."""
    argv = ["sacct", "-X", "--noheader", "--parsable2", f"--jobs={job}"]
    try:
        said = _question([*argv, "--format=State,ExitCode,NodeList,Timelimit,Reason"])
    except (Refused, Unreachable):  # no accounting, no sacct, or a database that is down: nobody knows more
        return None
    rows = [line.split("|") for line in said.splitlines() if line.count("|") >= 4]
    if not rows:
        return None
    state, code, nodes, limit, reason = rows[-1][:5]  # the newest incarnation
    word, _, by = state.partition(" by ")
    exit_code, _, number = code.partition(":")
    reason = reason.replace("None", "")
    return JobState(job, word, int(exit_code or 0), int(number or 0), reason, nodes, limit, by)


def missing(error: Unreachable) -> UserError:
    """The same for somebody who wanted to submit."""
    fix = "run this where Slurm's commands work (a login node), or look at the plan with --dry-run"
    return UserError(Problem(f"Slurm can't be reached: {error}", fix=fix))
