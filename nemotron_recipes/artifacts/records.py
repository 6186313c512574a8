"""The read side of the run folders: which runs there are, and what became of each. Writes nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_recipes import closing
from nemotron_recipes.artifacts.owner import fate
from nemotron_recipes.artifacts.reconcile import Evidence, State, exit_text, judge
from nemotron_recipes.errors import Problem, UserError, nearest, printable
from nemotron_recipes.pulse import limits_of, log_stopped, pulse
from nemotron_recipes.rundir import Damaged, RunDir, StageDir, read_json, read_jsonl
from nemotron_recipes.spec import JobHandle, Liveness, Tree

Ask = Callable[[JobHandle], Liveness]
Settle = Callable[[JobHandle], list[Tree]]
Together = Callable[[list[JobHandle]], tuple[Ask, Settle]]
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


@dataclass(frozen=True)
class RunView:
    """One run as it stands now. `plan` is plan.json as it is; empty when it can't be read."""

    id: str
    path: str
    title: str
    created: str  # ISO 8601, UTC
    state: State
    stages: tuple[StageView, ...]
    plan: Tree
    handle: JobHandle | None = None
    explanation: str = ""
    differences: tuple[str, ...] = ()  # sentences on where the sources disagree about it, where they were compared

    def stage(self, name: str) -> StageView:
        """The stage of that name; UserError names the nearest."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        fix = nearest(name, (stage.name for stage in self.stages))
        raise UserError(Problem(f"run {self.id} has no stage '{name}'", self.path, fix))


def run_folders(runs_root: Path, newest: int | None = None) -> list[Path]:
    """The folders of the `newest` runs below `runs_root` (all)."""
    folders = _run_folders(runs_root)
    if newest is not None:  # plan.json is written once, so its time says when; reading every plan would take seconds
        folders = sorted(folders, key=lambda folder: (folder / "plan.json").stat().st_mtime)[-newest:]
    return folders


def load_runs(folders: Iterable[Path], together: Together | None = None) -> list[RunView]:
    """The runs in these folders, newest first. A damaged one is among them, with what is wrong with it.

    together  given the handles of all runs whose end is not recorded, asks once how they stand: what `load_run` asks
    """
    opened = [_open(RunDir(folder)) for folder in folders if RunDir(folder).plan.exists()]
    open_ends = [run.handle for run in opened if run.handle and not _end_is_recorded(run.events)]
    asked = together(open_ends) if together and open_ends else (None, None)
    # Whoever was asked may have brought news of these.
    views = [_view(_open(run.run) if run.handle in open_ends else run, *asked) for run in opened]
    return sorted(views, key=lambda view: (view.created, view.id), reverse=True)


def find_run(runs_root: Path, text: str) -> Path:
    """The folder of the run whose id is `text`, or of the only one whose id contains it. UserError otherwise."""
    ids = [folder.name for folder in _run_folders(runs_root)]
    found = [run for run in ids if run == text] or [run for run in ids if text and text in run]
    if len(found) == 1:
        return runs_root / found[0]
    if found:
        raise UserError(
            Problem(f"'{text}' may be any of {', '.join(sorted(found))}", str(runs_root), "give more of it")
        )
    raise UserError(Problem(f"no run '{text}'", str(runs_root), nearest(text, ids) or "there are no runs there yet"))


def load_run(run_dir: Path, liveness: Ask | None = None, settle: Settle | None = None) -> RunView:
    """One run, its state put together from plan, handle, events and records. UserError when there is no such run.

    liveness  asks the executor; not asked when the launcher itself recorded the end. None: nobody can be asked
    settle    asks the executor how a run ended whose launcher could not record it
    """
    return _view(_open(RunDir(Path(run_dir))), liveness, settle)


@dataclass(frozen=True)
class _Opened:
    """A run folder as it was read."""

    run: RunDir
    plan: Tree
    handle: JobHandle | None
    events: list[Tree]
    damage: str = ""


def _open(run: RunDir) -> _Opened:
    try:
        plan, handle = read_json(run.plan), read_json(run.handle)
        events = _events(run.events)
    except Damaged as error:
        return _Opened(run, {}, None, [], str(error))
    if plan is None:
        raise UserError(Problem(f"{run.path} is not a run folder", fix="it has no plan.json"))
    return _Opened(run, plan, JobHandle(**handle) if handle else None, events)


def _events(path: Path) -> list[Tree]:
    """Damaged: a line, or the end, is not what was written."""
    closing.check(path)
    return list(read_jsonl(path, strict=True))


def _view(opened: _Opened, liveness: Ask | None, settle: Settle | None) -> RunView:
    if opened.damage:
        return _damaged(opened.run, opened.damage)
    try:
        return _whole_view(opened, liveness, settle)
    except Damaged as error:
        return _damaged(opened.run, str(error))


def _damaged(run: RunDir, what: str) -> RunView:
    return RunView(run.path.name, str(run.path), "", "", "lost", (), {}, explanation=what)


def _whole_view(opened: _Opened, liveness: Ask | None, settle: Settle | None) -> RunView:
    run, plan, handle, events = opened.run, opened.plan, opened.handle, opened.events
    alive = _liveness(events, handle, liveness)
    if alive in ("ended", "lost") and handle and settle and not _end_is_recorded(events):
        missing = settle(handle)
        events = _events(run.events)  # meanwhile the end may have been recorded by whoever
        if not _end_is_recorded(events):
            events += [{"time": time.time(), **event} for event in missing]
    stages = tuple(_stage_view(stage, run.stage(stage["name"]), events, alive) for stage in plan["stages"])
    state, explanation = _overall(stages, events, alive)
    return RunView(
        id=plan["id"],
        path=str(run.path),
        title=plan["title"],
        created=plan["created"],
        state=state,
        stages=stages,
        plan=plan,
        handle=handle,
        explanation=explanation,
    )


def _run_folders(runs_root: Path) -> list[Path]:
    return sorted(path.parent for path in Path(runs_root).glob("*/plan.json"))


def _liveness(events: list[Tree], handle: JobHandle | None, liveness: Ask | None) -> Liveness | None:
    """What is known of the whole run; a launcher that started later takes back an earlier end."""
    if _end_is_recorded(events):
        return "ended"
    return liveness(handle) if handle and liveness else None


def _end_is_recorded(events: list[Tree]) -> bool:
    turns = [e["event"] for e in events if e["event"] in (*BEGINS, "finished", "cancelled")]
    return bool(turns) and turns[-1] not in BEGINS


def _stage_view(stage: Tree, folder: StageDir, events: list[Tree], alive: Liveness | None) -> StageView:
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
    found = [event for event in _events(folder.events(attempt, 0)) if event["event"] == kind]
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
    for rank in sorted(int(path.name.split(".rank-")[1].removesuffix(".jsonl")) for path in found):  # may be thousands
        last = [event["event"] for event in _events(folder.events(attempt, rank))][-1:]
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


def _overall(stages: Iterable[StageView], events: list[Tree], alive: Liveness | None) -> tuple[State, str]:
    """(state, explanation) of the whole run."""
    states = {stage.state: stage for stage in reversed(tuple(stages))}  # the first stage of each state
    for state in ("stalled", "running", "failed", "lost", "cancelled"):
        if state in states:
            stage = states[state]
            return stage.state, f"stage {stage.name}: {stage.explanation or stage.note}".rstrip(": ")
    if "pending" not in states:
        return "succeeded", ""
    if alive in ("queued", "running"):
        return ("running" if alive == "running" else "pending"), ""
    last: dict[str, Any] = next((e for e in reversed(events) if e["event"] in ("cancelled", "finished")), {})
    if alive == "ended":
        if last.get("event") == "cancelled":
            return "cancelled", ""
        return "failed", printable(str(last.get("cause") or "the launcher ended before every stage had run"))
    if alive == "lost":
        return "lost", "nobody runs it any more, and nobody recorded an end"
    return "pending", "it was never submitted, or submitting it was interrupted"
