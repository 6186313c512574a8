"""One stage as it stands: what the launcher, its ranks, the record and the disk say of it, put together. Reads only."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_recipes import closing
from nemotron_recipes.artifacts.owner import fate
from nemotron_recipes.artifacts.reconcile import Evidence, State, exit_text, judge
from nemotron_recipes.errors import printable
from nemotron_recipes.pulse import limits_of, log_stopped, pulse
from nemotron_recipes.rundir import Damaged, StageDir, read_json, read_jsonl
from nemotron_recipes.spec import Liveness, Tree

TAIL_LINES = 12
TAIL_BYTES = 16384
BEGINS = ("submitted", "submitting", "driver-started")  # what follows the newest of these counts


@dataclass(frozen=True)
class StageView:
    """One stage as it stands now. Times are seconds since the epoch.

    note         a disagreement between the record and the exit code, or a gap in what is known
    explanation  for people, when it failed or got lost: the rank that failed first, its last lines, the log
    log          the log to look at: of the rank that failed first, else of rank 0
    """

    name: str
    state: State
    note: str = ""
    attempt: int = 0
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    fingerprint: str = ""
    outputs: Tree = field(default_factory=dict)  # slot -> {name, version, digest, uri}
    results: Tree = field(default_factory=dict)
    facts: Tree = field(default_factory=dict)  # name -> words: how it was done
    parents: list[Tree] = field(default_factory=list)
    explanation: str = ""
    log: str | None = None


def stage_view(stage: Tree, folder: StageDir, events: list[Tree], alive: Liveness | None) -> StageView:
    """stage: of the plan; events: of the launcher; alive: what is known of the whole run. Damaged."""
    name = stage["name"]
    if stage["reused"]:
        made = stage["reused"]
        output = {key: made[key] for key in ("name", "version", "digest", "uri")}
        return StageView(name, "reused", fingerprint=stage["fingerprint"], outputs={made["producer"]["slot"]: output})
    record = read_json(folder.record)
    attempt = max([*_launched(events, name), *_attempts(folder), record["attempt"] if record else 0])
    if record and record["attempt"] != attempt:
        record = None
    launched, exited, cancelled, retrying = _launcher_says(events, name, attempt)
    worker = _last_event(folder, attempt, "started")
    failure = folder.first_failure(attempt)
    exit_code = exited["exit_code"] if exited else None
    state, note = judge(
        Evidence(
            started=attempt > 0,
            exit_code=exit_code,
            record=record,
            failure=failure,
            cancelled=cancelled,
            liveness=alive,
            worker=fate(worker) if worker else None,
            launched=launched is not None,
            retrying=retrying and alive in ("queued", "running"),
            requeued=_requeued(events, name, attempt),
            stopped_by=_stopped_by_scheduler(events, name, attempt),
        )
    )
    if state == "running":
        state, note = _alive_or_stalled(stage, folder, attempt, note)
    said = record or {}
    began = launched or worker or {}
    ended = said.get("ended") or (exited or {}).get("time")
    explanation, log = _explain(folder, attempt, failure, note) if state in ("failed", "lost") else ("", None)
    if log is None and attempt:
        log = folder.log(attempt, 0)
    return StageView(
        name=name,
        state=state,
        note=note,
        attempt=attempt,
        exit_code=exit_code if exit_code is not None else said.get("exit_code"),
        started=said.get("started") or began.get("time"),
        ended=ended,
        fingerprint=stage["fingerprint"],
        outputs=said.get("outputs", {}),
        results=said.get("results", {}),
        facts=said.get("facts", {}),
        parents=said.get("parents", []),
        explanation=explanation,
        log=str(log) if log else None,
    )


def read_events(path: Path, ended: Mapping[Path, list[Any]] | None = None) -> list[Tree]:
    """Damaged: a line, or the end, is not what was written. ended: what `closing.marks` said of the run."""
    closing.check(path, ended)
    return list(read_jsonl(path, strict=True))


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log, however long it is; none when there is no log, and what is wrong with a damaged one."""
    try:
        closing.check(log)
        with open(log, "rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - TAIL_BYTES))
            text = handle.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    except Damaged as error:
        return str(error).splitlines()
    return [line.rsplit("\r", 1)[-1] for line in text.rstrip().split("\n")[-lines:] if line.strip()]


def _alive_or_stalled(stage: Tree, folder: StageDir, attempt: int, note: str) -> tuple[State, str]:
    """What the disk says of a stage whose processes are there."""
    found = pulse(folder, attempt, time.time(), *limits_of(stage.get("placement", {}).get("options", {})))
    if found is None:
        return "running", note
    if found.stalled:
        return "stalled", "; ".join([*([note] if note else []), found.words()])
    # Where no rank says that it trains, a trainer of another project does, which need not log on rank 0.
    notes = [note, log_stopped(folder, attempt) if found.judged else ""]
    return "running", "; ".join(each for each in notes if each)


def _launched(events: list[Tree], name: str) -> list[int]:
    return [e["attempt"] for e in events if e["event"] == "stage-started" and e["stage"] == name]


def _attempts(folder: StageDir) -> list[int]:
    """Attempts in which a worker wrote anything."""
    names = (path.name.split(".")[0].removeprefix("attempt-") for path in (folder.path / "events").glob("attempt-*"))
    return [int(number) for number in names if number.isdigit()]


def _launcher_says(events: list[Tree], name: str, attempt: int) -> tuple[Tree | None, Tree | None, bool, bool]:
    """(stage-started, stage-exited, cancelled, retrying) of this attempt, each seen after the one before."""
    started: Tree | None = None
    exited: Tree | None = None
    cancelled = retrying = False
    for event in events:
        kind, mine = event["event"], event.get("stage") == name and event.get("attempt") == attempt
        if kind == "stage-started" and mine:
            started, exited, cancelled, retrying = event, None, False, False
        elif kind == "stage-exited" and mine:
            exited = event
        elif kind == "cancelled" and event.get("stage") in (name, None):
            cancelled = True
        elif kind in BEGINS:
            retrying = attempt > 0
    return started, exited, cancelled, retrying


def _stopped_by_scheduler(events: list[Tree], name: str, attempt: int) -> str:
    """Why the scheduler ended this attempt (time limit, dead node, ...); "" when it didn't."""
    cause = ""
    for event in events:
        if event.get("stage") != name:
            continue
        if event["event"] == "stage-started" and event["attempt"] == attempt:
            cause = ""
        elif event["event"] == "finished" and event.get("scheduler"):
            cause = str(event["cause"])
    return cause


def _requeued(events: list[Tree], name: str, attempt: int) -> str:
    """Why this attempt's job went back into the queue; "" when it did not, or somebody has submitted anew since."""
    cause = ""
    for event in events:
        if event["event"] == "requeued" and (event["stage"], event["attempt"]) == (name, attempt):
            cause = event["cause"]
        elif event["event"] in BEGINS:
            cause = ""
    return cause


def _last_event(folder: StageDir, attempt: int, kind: str) -> Tree | None:
    """Rank 0's newest event of this kind."""
    found = [event for event in read_events(folder.events(attempt, 0)) if event["event"] == kind]
    return found[-1] if found else None


def _explain(folder: StageDir, attempt: int, failure: Tree | None, note: str) -> tuple[str, Path | None]:
    """(text, log): what the first failing rank said; where none did, the end of the log of a rank that fell silent."""
    lines = [note] if note else []
    if failure is not None:
        log = folder.log(attempt, failure["rank"])
        lines.append(f"rank {failure['rank']} on {failure['host']} failed first: {failure['message']}")
        told = failure["message"].splitlines()
        lines += [f"  | {line}" for line in failure["lines"][-TAIL_LINES:] if line not in told]
    else:
        silent = _silent_rank(folder, attempt)
        log = folder.launcher_log(attempt) if silent is None else folder.log(attempt, silent)
        if silent is not None:
            how = _killed_by(folder.launcher_log(attempt), silent) or "without a word"
            lines.append(f"rank {silent} ended {how}; its last lines:")
        lines += [f"  | {line}" for line in tail(log)]
    lines.append(f"log: {log}")
    if folder.launcher_log(attempt).exists() and log != folder.launcher_log(attempt):
        lines.append(f"launcher: {folder.launcher_log(attempt)}")
    return printable("\n".join(lines)), log


def _silent_rank(folder: StageDir, attempt: int) -> int | None:
    """The lowest rank that started and then neither finished nor failed nor stopped when asked."""
    found = (folder.path / "events").glob(f"attempt-{attempt}.rank-*.jsonl")
    ended = closing.marks(folder.path.parent)
    for rank in sorted(int(path.name.split(".rank-")[1].removesuffix(".jsonl")) for path in found):  # may be thousands
        last = [event["event"] for event in read_events(folder.events(attempt, rank), ended)][-1:]
        if last and last[0] not in ("finished", "failed", "cancelled"):
            return rank
    return None


def _killed_by(launcher_log: Path, rank: int) -> str:
    """`with exit code 137 (SIGKILL, ...)` where torchrun's closing report says so of this rank; its own code is 1.

    The report's form: torch.distributed.elastic.multiprocessing.errors.ChildFailedError.
    """
    report = "\n".join(tail(launcher_log, lines=200))
    found = re.findall(rf"rank\s*: {rank} \(.*\n\s*exitcode\s*: -(\d+) ", report)
    return f"with {exit_text(128 + int(found[-1]))}" if found else ""
