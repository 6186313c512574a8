"""Slurm's own commands, asked without a shell and never for long: sbatch, scontrol, sacct, squeue, scancel."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

from nemotron_recipes.errors import NemotronError, Problem, UserError
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.remote.transport import Unreachable
from nemotron_recipes.executors.slurm import states
from nemotron_recipes.executors.slurm.states import JobState

__all__ = ["JobState", "Refused", "Unreachable"]

_ASK_SECONDS = 20.0  # slurmctld answers in milliseconds; a dead one is noticed by the commands after their own time-out
_SUBMIT_SECONDS = 120.0
_SLOW_SECONDS, _REST_SECONDS = 1.0, 3.0
_JOBS_AT_ONCE, _NAMES_AT_ONCE = 5000, 500  # an argument holds 128 KiB
_silent: dict[str, float] = {}  # command -> until when it is not worth another try (time.monotonic)

_TIMES = {"SLURM_TIME_FORMAT": "%s"}  # else as the user's own environment and time zone have it

# How Slurm's commands say that nobody answers: no slurm.conf, no slurmctld, no reply within MessageTimeout; or that the
# connection broke (src/common/slurm_errno.c), maybe after slurmctld had heard them.
_NOBODY_ANSWERS = (
    *("Could not establish a configuration source", "Unable to contact slurm controller", "timed out"),
    *("Zero Bytes were transmitted or received", "Message receive failure", "Message send failure"),
    *("Communication connection failure", "Communication shutdown failure", "Unexpected message received"),
)


class Refused(NemotronError):
    """A command of Slurm's failed; the message is its own words."""


def job_state(job: str) -> JobState | None:
    """What Slurm knows of a job; None when it knows of none. Unreachable when it can't be asked.

    Whether it waits or runs, slurmctld knows at once; the database hears of it seconds later. How it ended, the
    accounting says, where there is one and it has heard of it. slurmctld forgets a job after MinJobAge (five minutes,
    unless the site says otherwise).
    """
    try:
        state = states.of_scontrol(job, _question(["scontrol", "--oneliner", "show", "job", job]))
    except Refused as error:
        if "Invalid job id" not in str(error):
            raise Unreachable(str(error)) from None
        return _accounted([job]).get(job)
    except states.Unclear as error:
        raise Unreachable(str(error)) from None
    return states.agreed(state, _accounted([job]).get(job)) if state.over else state


def job_states(jobs: Iterable[str]) -> dict[str, JobState]:
    """The same of many jobs, by id, those that Slurm knows: one question to slurmctld, one to the accounting.

    What both say is in the states. Unreachable when slurmctld can't be asked.
    """
    now: dict[str, JobState] = {}
    accounted: dict[str, JobState] = {}
    fields = ",".join(f"{name}:{width}|" for name, width in states.SQUEUE_FIELDS.items())
    argv = ["squeue", "--all", "--states=all", "--noheader", f"--Format={fields}"]
    for some in states.chunks(dict.fromkeys(jobs), _JOBS_AT_ONCE):
        try:
            now |= states.of_squeue(_question([*argv, f"--jobs={','.join(some)}"]))
        except Refused as error:
            if "Invalid job id" not in str(error):  # so it says where it knows none of them
                raise Unreachable(str(error)) from None
        except states.Unclear as error:
            raise Unreachable(str(error)) from None
        accounted |= _accounted(some)
    return states.merged(now, accounted)


def answer(*argv: str) -> str:
    """What one of Slurm's commands prints; patient, as for a submission. Unreachable: it refuses, or nobody answers."""
    try:
        return _question([*argv], _SUBMIT_SECONDS)
    except Refused as error:
        raise Unreachable(f"{argv[0]}: {error}") from None


def ask(*argv: str, errors: bool = False) -> str:
    """What one of Slurm's commands prints; times as seconds since the epoch. "" where it refuses or nobody answers.

    errors   what it prints as errors as well
    """
    try:
        return _question([*argv], _ASK_SECONDS, errors)
    except (Refused, Unreachable):
        return ""


def jobs_named(*names: str) -> dict[str, list[str]]:
    """Name -> ids of this user's unfinished jobs of that name; {} when Slurm can't be asked."""
    found: dict[str, list[str]] = {}
    for some in states.chunks(names, _NAMES_AT_ONCE):
        argv = ["squeue", "--noheader", "--format=%A %j", f"--name={','.join(some)}", "--me"]
        try:
            said = _run(argv, _ASK_SECONDS)
        except (Refused, Unreachable):
            continue
        for line in said.splitlines():
            job, _, name = line.partition(" ")
            found.setdefault(name.strip(), []).append(job)
    return found


def job_with(token: str, name: str, earlier: Collection[str]) -> str | None:
    """The job of that name with the token in its comment, whatever its state. Unreachable when nobody can be asked.

    A site may drop comments, and the accounting may not keep them: then it is the one of that name that is not one of
    `earlier`. Names hold a run's id.
    """
    said = _question(["squeue", "--me", "--states=all", "--noheader", f"--name={name}", "--format=%F|%k"])
    argv = ["sacct", "-X", "--noheader", "--parsable2", f"--name={name}", "--starttime=now-7days"]
    with suppress(Refused, Unreachable):  # there is none, or it is down: slurmctld has answered
        said += _question([*argv, "--format=JobID,Comment"])
    rows = [line.partition("|")[::2] for line in said.splitlines() if "|" in line]
    for name, comment in rows:
        job = states.job_of(name)
        if token in comment or ("nemotron=" not in comment and job not in earlier):
            return job
    return None


def scancel(jobs: Iterable[str]) -> None:
    """Ask for the end of jobs; of those that are over nothing is said."""
    jobs = [*jobs]
    if jobs:
        _run(["scancel", "--quiet", *jobs], _ASK_SECONDS)


def is_silence(said: str) -> bool:
    """Whether these words of a command mean that nobody has answered it."""
    return any(words in said for words in _NOBODY_ANSWERS)


def _run(argv: list[str], seconds: float, more: Mapping[str, str] | None = None, errors: bool = False) -> str:
    done = transport.call(there.run, argv, seconds, more)
    if done.get("missing"):
        raise Unreachable(f"{argv[0]} is not on the PATH of {transport.current().name or 'this machine'}")
    if done.get("late"):
        raise Unreachable(f"{argv[0]} did not answer within {seconds:.0f} s")
    if done["code"]:
        said = done["err"].strip() or done["out"].strip() or f"{argv[0]} ended with {done['code']}"
        if is_silence(said):
            raise Unreachable(said.splitlines()[-1])
        raise Refused(said)
    return str(done["out"]) + (str(done["err"]) if errors else "")


def _question(argv: list[str], seconds: float = _ASK_SECONDS, errors: bool = False) -> str:
    """Ask. Who has just kept us waiting for nothing is not asked again for a moment: a list of runs asks for many."""
    command, now = f"{transport.current().name} {argv[0]}", time.monotonic()
    if now < _silent.get(command, 0.0):
        raise Unreachable(f"{argv[0]} did not get an answer a moment ago")
    try:
        return _run(argv, seconds, _TIMES, errors)
    except Unreachable:
        if time.monotonic() - now > _SLOW_SECONDS:
            _silent[command] = time.monotonic() + _REST_SECONDS
        raise


def _accounted(jobs: list[str]) -> dict[str, JobState]:
    """What the accounting knows of them; {} when there is none, or it does not answer: nobody knows more then."""
    argv = ["sacct", "-X", "--noheader", "--parsable2", f"--jobs={','.join(jobs)}"]
    try:
        return states.of_sacct(ask(*argv, f"--format={states.SACCT_FIELDS}"))
    except states.Unclear as error:
        raise Unreachable(str(error)) from None


def missing(error: Unreachable) -> UserError:
    """The same for somebody who wanted to submit."""
    fix = error.fix or "run this where Slurm's commands work (a login node), or look at the plan with --dry-run"
    return UserError(Problem(f"Slurm can't be reached: {error}", fix=fix))
