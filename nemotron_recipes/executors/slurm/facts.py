"""What Slurm says of a job, as facts for readers; and of one that waits, the limit that it hits and what would fit."""

from __future__ import annotations

import re

from nemotron_recipes.executors.slurm import control, reasons
from nemotron_recipes.executors.slurm.control import JobState
from nemotron_recipes.executors.slurm.profile import limit_seconds
from nemotron_recipes.executors.slurm.states import differs
from nemotron_recipes.spec import JobFacts, Wait


def job_facts(stage: str, state: JobState) -> JobFacts:
    """The facts in what one question has told."""
    reason = state.reason or ("None" if state.state == "PENDING" else "")
    return JobFacts(
        stage=stage,
        job=state.job,
        state=state.state,
        active=state.active,
        waiting=state.waiting,
        reason=state.reason,
        words=reasons.words_of(reason),
        start=_seconds(state.details.get("StartTime", "")),
        nodes=state.nodes,
    )


def difference(stage: str, state: JobState, ended: str) -> str:
    """Where the sources differ about a job: slurmctld, the accounting, the run folder; "" where they agree.

    ended   how the stage ended as the run folder says: succeeded, failed, cancelled; "ended" where only the run's end
            is there, "" where none is
    """
    words = dict(state.told) if differs(state) else {}
    waits = state.active and state.state not in ("COMPLETING", "RUNNING")  # the launcher writes its end before it goes
    tells = ended in ("succeeded", "failed", "cancelled") and state.over
    if (ended and waits) or (tells and (ended == "succeeded") != (state.state == "COMPLETED")):
        words = {**state.told, "the run folder": ended}
    if not words:
        return ""
    return f"{stage}: " + ", ".join(f"{source} says {word} of job {state.job}" for source, word in words.items())


def wait_of(stage: str, state: JobState) -> Wait:
    """Why this job has not started; asks Slurm for the limits that its reason speaks of."""
    reason = state.reason or "None"
    limit = reasons.limit_of(reason)
    if limit is not None:
        text = control.ask("scontrol", "show", "assoc_mgr", "flags=assoc,qos")
        limits, fits = _policy(limit, state, text)
    else:
        limits, fits = _LIMITS.get(reason, _nothing)(state)
    advice = reasons.advice_for(reason).replace("JOB", state.job)
    start = _seconds(state.details.get("StartTime", ""))
    words = reasons.words_of(reason)
    return Wait(stage, state.job, reason, words, limits, (*fits, *([advice] if advice else ())), start)


Told = tuple[tuple[str, ...], tuple[str, ...]]  # limits, what would fit


def _nothing(state: JobState) -> Told:
    return (), ()


def _policy(limit: reasons.Limit, state: JobState, text: str) -> Told:
    limits, fits = [], []
    unit = f" {limit.resource}" if limit.resource else " min" if limit.field.endswith(("WallPJ", "Wall")) else ""
    for found in reasons.measured(limit, state.details, text):
        used = f", {found.used} in use" if found.used is not None else ""
        limits.append(f"{found.where} is {found.allowed}{unit}{used}")
        if limit.field == "MaxWallPJ":
            fits.append(f"run.time={found.allowed} or less (it asks for {state.limit})")
        elif limit.of_one_job:
            word = "at least" if limit.field.startswith("Min") else "at most"
            fits.append(f"{word} {found.allowed}{unit} (it asks for {_asked(state, limit.resource)})")
        elif found.used is not None and found.allowed.isdecimal() and found.used.isdecimal():
            free = max(0, int(found.allowed) - int(found.used))
            if limit.resource:
                asked = _asked(state, limit.resource)
                if asked.isdecimal() and int(asked) > int(found.allowed):
                    fits.append(
                        f"never: it asks for {asked}{unit}, and no more than {found.allowed} are allowed at all"
                    )
                else:
                    fits.append(f"{free}{unit} now (it asks for {asked})")
    return tuple(limits), tuple(fits)


def _asked(state: JobState, resource: str) -> str:
    """How much of a resource the job asks for, as its TRES say."""
    text = state.details.get("ReqTRES") or state.details.get("TRES", "")
    return dict(part.partition("=")[::2] for part in text.split(",")).get(resource, "none")


def _partition(state: JobState) -> dict[str, str]:
    name = state.details.get("Partition", "")
    text = control.ask("scontrol", "--oneliner", "show", "partition", name)
    return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", text))


def _partition_time(state: JobState) -> Told:
    most = _partition(state).get("MaxTime", "")
    if limit_seconds(most) is None:
        return (), ()
    where = f"partition {state.details.get('Partition')}"
    return (f"{where} MaxTime is {most}",), (f"run.time={most} or less (it asks for {state.limit})",)


def _partition_nodes(state: JobState) -> Told:
    told = _partition(state)
    if not told:
        return (), ()
    where = f"partition {state.details.get('Partition')}"
    limits = [f"{where} has {told.get('TotalNodes')} node(s) in all"]
    limits += [f"{where} {key} is {told[key]}" for key in ("MinNodes", "MaxNodes") if told.get(key, "0") != "0"]
    most = told.get("MaxNodes", "")
    most = most if most.isdecimal() else told.get("TotalNodes", "")
    return tuple(limits), (f"run.nodes={most} or less (it asks for {_asked(state, 'node')})",)


def _partition_config(state: JobState) -> Told:
    (first, fits), (second, more) = _partition_nodes(state), _partition_time(state)
    return (*first, *second), (*fits, *more)


def _resources(state: JobState) -> Told:
    name = state.details.get("Partition", "")
    told = control.ask("sinfo", "--noheader", f"--partition={name}", "--format=%T %D").split("\n")
    counts: dict[str, int] = {}
    for line in told:
        word, _, number = line.partition(" ")
        if number.strip().isdecimal():
            counts[word.rstrip("*~#!%$@^-")] = counts.get(word.rstrip("*~#!%$@^-"), 0) + int(number)
    if not counts:
        return (), ()
    nodes = ", ".join(f"{number} {word}" for word, number in sorted(counts.items()))
    asked = _asked(state, "node")
    return (f"partition {name} has nodes {nodes}",), (
        f"{counts.get('idle', 0)} whole node(s) now (it asks for {asked})",
    )


def _dependency(state: JobState) -> Told:
    return (f"dependency {state.details.get('Dependency', '?')}",), ()


_LIMITS = {
    "PartitionTimeLimit": _partition_time,
    "PartitionNodeLimit": _partition_nodes,
    "PartitionConfig": _partition_config,
    "Resources": _resources,
    "Priority": _resources,
    "Dependency": _dependency,
    reasons.NEVER: _dependency,
}


def _seconds(text: str) -> float | None:
    return float(text) if text.isdecimal() else None
