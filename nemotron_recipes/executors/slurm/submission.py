"""Handing one job to Slurm so that it is there once or not at all, whatever dies or falls silent meanwhile.

Every attempt of a stage has a token of its own. It is on disk before sbatch starts, and travels in the job's comment.
sbatch writes its answer into a file named after the token (there.submit), which exists from before it starts, so that

- whoever finds no file creates it: then no sbatch can start any more for that token;
- whoever finds a lock on it knows that sbatch is still at work;
- whoever finds an answer has it; and where sbatch could not say, Slurm is asked for the token.

Nothing is ever submitted a second time under the same token; while it is not known what became of one, that is said.
"""

from __future__ import annotations

import re
import secrets
import signal
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from nemotron_recipes.errors import JobFailed
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.remote.transport import Unreachable
from nemotron_recipes.executors.slurm import control

MARK = "nemotron="
_SECONDS = 120.0  # for sbatch to answer
PATIENCE = 20.0  # for one that is still at work when somebody wants to take its job back
SETTLED_SECONDS = 30.0  # at least
_POLL_SECONDS = 0.2


class Unknown(JobFailed):
    """Whether Slurm has accepted a job can't be told now."""


def new_token(name: str) -> str:
    """For one attempt of a job of that name, which holds the run's id."""
    return f"{MARK}{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.{secrets.token_hex(4)}"


def submit(
    argv: Sequence[str],
    cwd: str,
    hidden: Collection[str],
    answer: Path,
    token: str,
    name: str,
    earlier: Collection[str],
) -> str:
    """The job's id. Refused: Slurm has not taken it, in its own words; Unreachable: it was never asked; else Unknown.

    hidden    names of variables that the job does not inherit, beside those that read like secrets
    answer    the file below which sbatch's answer is kept
    earlier   jobs of the same name that belong to earlier attempts
    """
    try:
        said = transport.call(there.submit, [*argv], _SECONDS, cwd, answer, [*hidden])
    except Unreachable as error:
        return _found_or_raise(answer, token, name, earlier, str(error))
    if said.get("missing"):
        raise Unreachable(f"{argv[0]} is not on the PATH of {transport.current().name or 'this machine'}")
    job = job_of(said.get("out", ""))
    if job and said.get("code") == 0:
        return job
    if said.get("late") or said.get("code") == 0:  # on a full disk sbatch can't write down what it knows
        return _found_or_raise(answer, token, name, earlier, "sbatch did not say what became of it")
    words = (said.get("err") or said.get("out") or "").strip() or f"sbatch ended with {said['code']}"
    if not _refused(said["code"], words):
        return _found_or_raise(answer, token, name, earlier, words.splitlines()[-1])
    raise control.Refused(words)


def found(answer: Path, token: str, name: str, earlier: Collection[str], patience: float = 0.0) -> str | None:
    """The job that carries the token; None: there is none, and there won't be. Unknown, or Unreachable."""
    deadline = time.monotonic() + patience
    while True:
        said = transport.call(there.answered, answer)
        if not said["alive"] or time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    if said["alive"]:
        raise Unknown("sbatch is still at work on it")
    if not said["begun"]:
        if transport.call(there.forestall, answer):
            return None
        return found(answer, token, name, earlier, patience)  # it has begun at this moment
    job = job_of(said["out"])
    if job:
        return job
    if "code" in said and _refused(said["code"], said["err"]):
        return None
    job = control.job_with(token, name, earlier)
    if job is None and said["quiet"] < settled_seconds():
        raise Unknown(f"sbatch has ended without an answer {said['quiet']:.0f} s ago, and Slurm knows of no job yet")
    return job


def _refused(code: int, words: str) -> bool:
    """Whether sbatch has said no. What a signal ended (in a site's script: 128 and its number) may have been heard.

    255 is sbatch's own: it could not read its options.
    """
    ended = code < 0 or 128 < code <= 128 + signal.SIGRTMAX
    return code != 0 and not ended and not control.is_silence(words)


def settled_seconds() -> float:
    """After sbatch's end without a word: slurmctld drops what it has not read after MessageTimeout."""
    said = control.ask("scontrol", "show", "config")
    found = re.search(r"^MessageTimeout\s*=\s*(\d+)", said, re.MULTILINE)
    return max(SETTLED_SECONDS, float(found[1]) if found else 0.0)


def job_of(out: str) -> str | None:
    """The id in what sbatch prints."""
    said = re.search(r"^(?:Submitted batch job )?(\d+)(?:;\S+)?\s*$", out, re.MULTILINE)
    return said[1] if said else None


def _found_or_raise(answer: Path, token: str, name: str, earlier: Collection[str], why: str) -> str:
    """After an answer that says nothing: what Slurm, asked for the token, knows of it."""
    try:
        job = found(answer, token, name, earlier)
    except (Unreachable, Unknown) as error:
        raise Unknown(f"{why}; {error}" if str(error) != why else why) from None
    if job is None:
        raise Unreachable(why)
    return job
