"""The handle of a Slurm run, kept where it was submitted and in the run's folder; and what a cut submission left."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import NemotronError
from nemotron_recipes.executors.remote import sites, there, transport
from nemotron_recipes.executors.remote.transport import Unreachable
from nemotron_recipes.executors.slurm import control, files, outcome, script, submission
from nemotron_recipes.rundir import RunDir, read_json, read_jsonl, write_sealed
from nemotron_recipes.spec import JobHandle, Tree

# A submission from another machine, whose lock is not seen here, is at work or was cut off: after its last sign of life
# nobody waits longer for sbatch than this.
ELSEWHERE_SECONDS = 300.0


def keep(handle: JobHandle) -> None:
    """Durable here, and there."""
    keep_here(handle)
    keep_there(handle)


def keep_here(handle: JobHandle) -> None:
    """Durable: from now on whoever looks at the run on this machine knows of its jobs."""
    write_sealed(RunDir(Path(handle.run_dir)).handle, asdict(handle))


def keep_there(handle: JobHandle) -> None:
    """Where somebody who looks at the folder on the cluster finds it; nothing where that is this machine."""
    run, where = RunDir(Path(handle.run_dir)), transport.current()
    if where.name:
        native = {key: value for key, value in handle.native.items() if key != "remote"}
        native["submitted_from"] = "elsewhere"
        far = replace(handle, run_dir=where.far(run.path), native=native)
        transport.call(there.write_document, run.handle, asdict(far))


def tell(run: RunDir, event: str, **fields: Any) -> None:
    """Append to the run's events."""
    transport.call(there.event, run.events, event, fields)


@contextmanager
def alone(run: RunDir, wait: bool = False) -> Iterator[bool]:
    """Whether nobody else on this machine, or on one that shares its locks, submits this run or repairs its handle."""
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        lock = open(run.path / "submit.lock", "ab")  # noqa: SIM115  closed below
    except PermissionError:  # somebody else's run
        yield False
        return
    with lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def earlier_jobs(run: RunDir, handle: JobHandle | None) -> set[str]:
    """Jobs of earlier submissions of this run. handle: of the present one, or of the last one before a new one."""
    events: list[Tree] = list(read_jsonl(run.events))
    accepted = [event for event in events if event["event"] == "job-accepted"]
    noted = handle.native.get("earlier", []) if handle else []  # an event may be missing
    return {*noted, *(event[key] for event in accepted for key in ("job", "array") if key in event)}


def answer(run: RunDir, handle: JobHandle, name: str) -> Path:
    """Where sbatch's answer to what is called so in the handle is kept: a stage's job, or its array."""
    stage = run.stage(name.removesuffix(script.ARRAY_SUFFIX))
    return files.answer(stage, handle.native["tokens"][name])


def announce(run: RunDir, handle: JobHandle, attempts: Mapping[str, int]) -> str:
    """Write into the folder there that all jobs are in the queue; "", or why it could not be done: `recovered` does it.

    The handle is here by now. Nothing that goes wrong after that may look like a submission that has failed.
    """
    try:
        keep_there(handle)
        _tell_accepted(run, handle, attempts)
    except (Unreachable, OSError) as error:
        return str(error)
    return ""


def _tell_accepted(run: RunDir, handle: JobHandle, attempts: Mapping[str, int]) -> None:
    """That the jobs of these stages are in the queue."""
    jobs = handle.native["jobs"]
    for name, attempt in attempts.items():
        array = jobs.get(script.array_of(name))
        fields = {"job": jobs[name], **({"array": array} if array else {})}
        tell(run, "job-accepted", stage=name, attempt=attempt, **fields)


def find(handle: JobHandle, stage: str, patience: float = 0.0) -> str | None:
    """The job of a stage's attempt; None: there is none, and there won't be. Unknown, or Unreachable."""
    run, native = RunDir(Path(handle.run_dir)), handle.native
    place, token = answer(run, handle, stage), native["tokens"][stage]
    return submission.found(place, token, native["names"][stage], earlier_jobs(run, handle), patience)


class Undecided(Unreachable):
    """Whether Slurm has accepted all jobs of a submission can't be told now."""


def recovered(handle: JobHandle) -> JobHandle:
    """The handle with every job of its submission, whose submitter may have died. Unreachable; Undecided.

    A submission that came only half way is taken back: its jobs are cancelled, and that is recorded. What is missing
    of one that is whole are the events that say so.
    """
    run = RunDir(Path(handle.run_dir))
    if (_is_whole(handle) and not _untold(run, handle)) or outcome.has_ended(run):
        return handle
    with transport.through(sites.of_handle(handle)), alone(run) as mine:
        told = read_json(run.handle)
        handle = JobHandle(**told) if told else handle  # somebody may have come to its end meanwhile
        native = handle.native
        if outcome.has_ended(run):
            return handle
        if not mine or (native.get("submitted_from") and time.time() - run.handle.stat().st_mtime < ELSEWHERE_SECONDS):
            if _is_whole(handle):
                return handle
            raise Unreachable("it is being submitted at this moment")
        if _is_whole(handle):
            with suppress(NemotronError, OSError):  # the next who looks tries again
                _make_up(run, handle)
            return handle
        jobs = {}
        for stage in native["tokens"]:
            try:
                jobs[stage] = native["jobs"].get(stage) or find(handle, stage)
            except (submission.Unknown, Unreachable) as error:
                raise Undecided(f"it is not known whether Slurm has accepted {stage}: {error}") from None
        accepted = {stage: job for stage, job in jobs.items() if job}
        handle = replace(handle, native={**native, "jobs": accepted})
        keep(handle)
        if len(accepted) == len(jobs):
            _tell_accepted(run, handle, files.attempts(run))
        else:
            withdraw(run, handle)
    return handle


def _is_whole(handle: JobHandle) -> bool:
    """Whether every job of the submission is in the handle."""
    return bool(handle.native.get("tokens", {}).keys() <= handle.native["jobs"].keys())


def _untold(run: RunDir, handle: JobHandle) -> dict[str, int]:
    """Stages of the newest submission, with their attempts, of which no event says that their jobs are in the queue."""
    if "tokens" not in handle.native:
        return {}
    told = {e["stage"] for e in outcome.since_submission(run) if e["event"] == "job-accepted"}
    return {name: attempt for name, attempt in files.attempts(run).items() if name not in told}


def _make_up(run: RunDir, handle: JobHandle) -> None:
    """What `announce` could not do. The copy is refreshed before and after: nothing is told twice."""
    where = transport.current()
    where.refresh()
    untold = _untold(run, handle)
    if untold:
        keep_there(handle)
        _tell_accepted(run, handle, untold)
        where.refresh()


def withdraw(run: RunDir, handle: JobHandle) -> None:
    """Cancel the jobs in the handle, and record that. Unreachable, or Refused."""
    transport.call(there.write, files.submission(run), files.attempts_text({}), 0o644)  # none may begin
    control.scancel(handle.native["jobs"].values())
    transport.call(there.remove, files.secrets(run))
    tell(run, "cancelled", stage=None, attempt=None)
