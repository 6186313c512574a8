"""When a job goes back into the queue: by which time its workers must have saved, who asked, and the shell for it.

The launcher decides (in the container, where Slurm's commands may be missing) and leaves its events in a file; the
batch script, outside, adds them to the run's and calls `scontrol requeue`, unless somebody has cancelled the job since.
Standard library only.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemotron_recipes.errors import Cancelled, Unfinished
from nemotron_recipes.executors.slurm.files import NodeReport, first_failure, requeue_wish
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import RunDir, StageDir, latest_checkpoint, read_jsonl
from nemotron_recipes.spec import Tree

JOB_END_ENV = "NEMOTRON_JOB_END"  # seconds since the epoch, as Slurm says outside the container; empty: no limit
WISH_ENV = "NEMOTRON_REQUEUE_FILE"
ENDED_AS_ENV = "NEMOTRON_ENDED_AS"  # how Slurm's database calls the end of the attempt before; mostly empty

DEFAULT_MARGIN = 60.0  # seconds; of short jobs a tenth of their time
_ENDING_SECONDS = 10.0  # of a process that has saved, at most: Python with torch takes some
_STOPPED_CODES = (Unfinished.exit_code, Cancelled.exit_code, 128 + 15)

# Why, as the events say it.
TIME_LIMIT, SIGNAL, PREEMPTED, NODE_FAILURE, WORKER, SCHEDULER, STALLED = (
    *("time-limit", "signal", "preempted", "node-failure", "worker", "scheduler", "stalled"),
)


def margin_seconds(given: float | None, remaining: float) -> float:
    """How long before the end of the allocation all must be saved."""
    return given if given is not None else min(DEFAULT_MARGIN, remaining / 10)


def deadline_of(environ: Mapping[str, str], margin: float | None, now: float) -> float | None:
    """By when the workers must have saved and ended; None when the allocation has no end."""
    text = environ.get(JOB_END_ENV, "")
    if not text.isdecimal():  # N/A, NONE, UNLIMITED, or Slurm did not answer
        return None
    return int(text) - margin_seconds(margin, max(0.0, int(text) - now))


def alarm_of(environ: Mapping[str, str], deadline: float) -> float:
    """When the launchers tell workers to stop that are still there: those who heed the deadline need time to end."""
    remaining = int(environ[JOB_END_ENV]) - deadline
    return deadline + min(_ENDING_SECONDS, remaining / 4)


def wish_of(reports: Sequence[NodeReport], nodes: int, deadline: float | None) -> str:
    """Why an attempt that did not succeed may go on in another one; "" when it may not: the code itself failed.

    TIME_LIMIT: the workers ended for the deadline, by themselves or when the launchers asked. WORKER: they ended with
    the same exit code though there is no deadline. SIGNAL: Slurm told all nodes to stop.
    """
    first = first_failure([*reports])
    code = first.code if first else 0
    if code == Unfinished.exit_code:
        return WORKER if deadline is None else TIME_LIMIT
    if any(report.overdue for report in reports):
        return TIME_LIMIT if first is None or code in _STOPPED_CODES else ""
    all_told = len(reports) >= nodes and all(report.stopped for report in reports)
    return SIGNAL if all_told else ""


def used_up(restarts: int, allowed: int) -> str:
    """Why an attempt must not start; "" when it may. Somebody else has put the job back once more than it should be."""
    return "" if restarts <= allowed else f"the job was put back {restarts} times; max_requeues is {allowed}: raise it"


def given_up(wish: str, allowed: int) -> str:
    """Why a run ends here although its workers would go on."""
    what = "the worker ended with exit code 75: it wants to be started again"
    if wish == TIME_LIMIT:
        what = "the time limit is reached but for the time to save"
    used = f"all {allowed} requeues are used" if allowed else "max_requeues is 0"
    advice = "raise max_requeues or `time`, and go on from the last checkpoint with train.resume=true"
    return f"{what}, and {used}; {advice}"


def ended_as(state: str) -> str:
    """The cause that Slurm's word for the end of the attempt before stands for."""
    words = {"NODE_FAIL": NODE_FAILURE, "PREEMPTED": PREEMPTED, "TIMEOUT": TIME_LIMIT}
    return words.get(state.split(" ")[0], SCHEDULER)


def requeued_event(stage: StageDir, name: str, attempt: int, cause: str, requeues: int) -> Tree:
    """`requeues`: how often the job has gone back, this time included. step: of the last whole checkpoint."""
    newest = latest_checkpoint(stage.checkpoints)
    step = int(newest.name.rpartition("_")[2]) if newest else None
    fields = {"stage": name, "attempt": attempt, "cause": cause, "step": step, "requeues": requeues}
    return {"time": round(time.time(), 3), "event": "requeued", **fields}


def is_told(run: RunDir, stage: str, attempt: int) -> bool:
    """Whether the events say already that this attempt was followed by a requeue."""
    return any(
        event["event"] == "requeued" and (event["stage"], event["attempt"]) == (stage, attempt)
        for event in read_jsonl(run.events)
    )


def leave_wish(environ: Mapping[str, str], events: Sequence[Tree]) -> bool:
    """Ask the batch script to requeue, with the events that it then adds; False when it is not one of ours."""
    file = environ.get(WISH_ENV)
    if file:
        write_atomic(Path(file), "".join(json.dumps(event) + "\n" for event in events))
    return bool(file)


def setup_lines(run: RunDir, stage: StageDir, max_requeues: int) -> tuple[str, ...]:
    """For the batch script: what the launcher has to know of the job, and what is to be done when it asks for it."""
    ask = 'SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e'
    lines: tuple[str, ...] = (f'export {JOB_END_ENV}="${{SLURM_JOB_END_TIME:-$({ask})}}"',)
    if not max_requeues:
        return lines
    sacct = 'sacct --duplicates --allocations --noheader --parsable2 --jobs="$SLURM_JOB_ID" --format=State'
    wish = f"{shlex.quote(str(requeue_wish(stage, '')))}$SLURM_JOB_ID"
    events = shlex.quote(str(run.events))
    return (
        *lines,
        f"export {WISH_ENV}={wish}",
        f'rm -f "${WISH_ENV}"',
        'if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then',
        f'    export {ENDED_AS_ENV}="$({sacct} 2>/dev/null | grep -v -e RUNNING -e PENDING | tail -n 1)"',
        "fi",
        # The last attempt: Slurm must not put it back by itself either. Not every site lets users change that.
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_requeues} ]; then',
        '    scontrol update JobId="$SLURM_JOB_ID" Requeue=0',
        "fi",
        "requeue_if_asked() {",
        f'    [ -s "${WISH_ENV}" ] || return 0',
        '    local job="$(scontrol --oneliner show job "$SLURM_JOB_ID")" events="$(<"$' + WISH_ENV + '")"',
        '    [[ $job == *" JobState=RUNNING "* ]] || return 0  # somebody has cancelled it',
        f'    [[ $job != *" PreemptTime="[0-9]* ]] || events="${{events/: \\"{SIGNAL}\\"/: \\"{PREEMPTED}\\"}}"',
        # A line that a crash has cut short is not joined.
        f'    [ -z "$(tail -c 1 {events} 2>/dev/null)" ] || events=$\'\\n\'"$events"',
        f"    printf '%s\\n' \"$events\" >> {events}",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "}",
        "trap requeue_if_asked EXIT",
    )
