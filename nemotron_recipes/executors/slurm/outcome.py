"""What Slurm knows of a run's end when nobody inside the job could say it: time limit, dead node, scancel, memory.

A launcher that is killed writes nothing. Readers put its events together from the run folder and Slurm's own word.
"""

from __future__ import annotations

import time
from pathlib import Path

from nemotron_recipes.container_words import container_trouble, nodes_of
from nemotron_recipes.executors import verdict
from nemotron_recipes.executors.slurm import files
from nemotron_recipes.executors.slurm.control import JobState
from nemotron_recipes.executors.torchrun import RankFailure
from nemotron_recipes.rundir import RunDir, StageDir, read_json, read_jsonl
from nemotron_recipes.spec import Tree

# What Slurm's words for an end mean. Reason and time limit are filled in from what it says of the job.
_WORDS = {
    "TIMEOUT": "the time limit of {limit} was reached",
    "DEADLINE": "its deadline was reached",
    "OUT_OF_MEMORY": "a node's memory limit was exceeded",
    "NODE_FAIL": "a node failed: one of {nodes}",
    "BOOT_FAIL": "a node could not be started: one of {nodes}",
    "PREEMPTED": "it was preempted",
    "REVOKED": "it was revoked by another cluster",
}
_ADVICE = {
    "TIMEOUT": "; raise `time`, and go on from the last checkpoint with train.resume=true",
    "OUT_OF_MEMORY": "; raise `mem`, or lower the micro batch size",
    "NODE_FAIL": "; start it again, with train.resume=true to go on from the last checkpoint",
    "PREEMPTED": "; start it again, with train.resume=true to go on from the last checkpoint",
}


def since_submission(run: RunDir) -> list[Tree]:
    """The launcher's events of the newest submission."""
    events = list(read_jsonl(run.events))
    begins = [place for place, event in enumerate(events) if event["event"] == "submitting"]
    return events[begins[-1] :] if begins else events


def has_ended(run: RunDir) -> bool:
    """Whether the newest submission's end is recorded."""
    return any(event["event"] in ("finished", "cancelled") for event in since_submission(run))


def ends(run: RunDir) -> dict[str, str]:
    """Stage -> succeeded, failed or cancelled, of the newest submission's stages whose end the launchers recorded."""
    found: dict[str, str] = {}
    for event in since_submission(run):
        stage = str(event.get("stage") or "")
        if event["event"] == "stage-exited":
            found[stage] = "failed" if event["exit_code"] else "succeeded"
        elif event["event"] in ("requeued", "stage-started"):
            found.pop(stage, None)
        elif event["event"] == "finished" and event["state"] == "failed" and stage:
            found[stage] = "failed"
        elif event["event"] == "cancelled" and stage:
            found[stage] = "cancelled"
    return found


def missing_events(run: RunDir, states: dict[str, JobState], fingerprints: dict[str, str]) -> list[Tree]:
    """The events that end the newest submission, as the launcher would have written them; [] when they are there.

    states   what Slurm says of each stage's job, for as many as it knows; none of them is active any more
    """
    told = since_submission(run)
    if any(event["event"] in ("finished", "cancelled") for event in told):
        return []
    begun = {event["stage"]: event for event in told if event["event"] == "stage-started"}
    ended = {(event["stage"], event["attempt"]) for event in told if event["event"] == "stage-exited"}
    missing: list[Tree] = []
    for name, first in files.attempts(run).items():
        stage = StageDir(run.stage(name).path)
        attempt = max(first + (states[name].restarts if name in states else 0), begun.get(name, {}).get("attempt", 0))
        if begun.get(name, {}).get("attempt") != attempt:  # it went back into the queue, and did not come to work again
            begun.pop(name, None)
        if name not in states:  # forgotten: without accounting that takes minutes, and later stages take hours
            if verdict.is_done(read_json(stage.record), fingerprints[name]):
                continue
            return []
        state = states[name]
        if state.state == "CANCELLED":
            started = name in begun
            end: Tree = {"event": "cancelled", "stage": name if started else None}
            missing.append({**end, "attempt": attempt if started else None, "by": state.by})
            break
        if name in begun and (name, attempt) not in ended and state.state in ("COMPLETED", "FAILED"):
            code = state.exit_code or (128 + state.signal if state.signal else 0)
            seconds = round(max(0.0, time.time() - begun[name]["time"]), 3)  # at most: nobody saw it end
            exited = {"event": "stage-exited", "stage": name, "attempt": attempt, "exit_code": code}
            missing.append({**exited, "seconds": seconds})
        cause = _cause(state, stage, attempt, fingerprints[name], begun.get(name))
        if cause:
            end = {"event": "finished", "state": "failed", "stage": name, "cause": cause}
            missing.append({**end, "scheduler": state.state} if state.state != "FAILED" else end)
            break
    else:
        missing.append({"event": "finished", "state": "succeeded"})
    return missing


def _cause(state: JobState, stage: StageDir, attempt: int, fingerprint: str, began: Tree | None) -> str:
    """Why the job of a stage did not do its work; "" when it did."""
    what = f"job {state.job} ended as {state.state}"
    if state.state in _WORDS:
        words = _WORDS[state.state].format(limit=state.limit or "the job", nodes=state.nodes or "its nodes")
        return f"{words} ({what}){_ADVICE.get(state.state, '')}"
    log = files.batch_log(stage, state.job)
    if state.state == "FAILED" and files.requeue_wish(stage, state.job).exists():
        return f"{what}: it was to go back into the queue, but Slurm did not take it:{_tail(log)}"
    first = files.first_failure(files.read_reports(stage, attempt))
    if first and first.problem:
        return f"{first.host}: {first.problem}"
    trouble = _container_trouble(stage, state, what) if first is None else ""
    if trouble:
        return trouble
    code = state.exit_code or (128 + state.signal if state.signal else 0)
    if state.state == "COMPLETED":
        code = 0
    elif not code:
        return f"{what}{f' ({state.reason})' if state.reason else ''}"
    if state.state != "COMPLETED" and began is None and first is None:
        said = _tail(log) + _tail(nodes) if (nodes := files.nodes_log(stage, state.job)).exists() else _tail(log)
        return f"{what} with exit code {verdict.named(code)} before anything was started:{said}"
    failure = None
    if first and first.rank is not None and first.rank_exit_code is not None:
        failure = RankFailure(first.rank, first.rank_exit_code)
    log = files.launcher_log(stage, attempt, first.node if first else 0)
    return verdict.failure_cause(stage, fingerprint, attempt, code, failure, log)


def _container_trouble(stage: StageDir, state: JobState, what: str) -> str:
    """What Pyxis said of the container that it could not make, on whichever node; "" where it was made."""
    logs = [files.nodes_log(stage, state.job), files.batch_log(stage, state.job)]
    text = "\n".join(filter(None, map(_text, logs)))
    found = container_trouble(text) if state.state == "FAILED" else None
    if found is None:
        return ""
    nodes = ", ".join(nodes_of(text))
    log = next((log for log in logs if container_trouble(_text(log) or "")), logs[0])
    return f"{nodes}{': ' if nodes else ''}{found[0]} ({what}); {found[1]}:{_tail(log)}"


def _text(log: Path) -> str | None:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _tail(log: Path, lines: int = 8) -> str:
    found = _text(log)
    if found is None:
        return f" it left no log {log}: does the node see that folder, and has this user room there?"
    text = found.splitlines()
    return "".join(f"\n  | {line}" for line in text[-lines:]) + f"\n  log: {log}"
