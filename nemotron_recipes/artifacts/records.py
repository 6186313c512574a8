"""The read side of the run folders: which runs there are, and what became of each. Writes nothing."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.reconcile import State
from nemotron_recipes.artifacts.stages import BEGINS, StageView, read_events, stage_view
from nemotron_recipes.errors import Problem, UserError, nearest, printable
from nemotron_recipes.rundir import Damaged, RunDir, read_json
from nemotron_recipes.spec import JobHandle, Liveness, Tree

Ask = Callable[[JobHandle], Liveness]
Settle = Callable[[JobHandle], list[Tree]]
Together = Callable[[list[JobHandle]], tuple[Ask, Settle]]


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

    @property
    def command(self) -> str:
        """What was asked, with the values that were typed, or set by a sweep."""
        request = self.plan.get("request", {})
        return command_line(self.title, request.get("mode"), request.get("profile"), request.get("overrides", ()))

    def stage(self, name: str) -> StageView:
        """The stage of that name; UserError names the nearest."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        fix = nearest(name, (stage.name for stage in self.stages))
        raise UserError(Problem(f"run {self.id} has no stage '{name}'", self.path, fix))


def command_line(title: str, mode: str | None, profile: str | None, overrides: Iterable[str]) -> str:
    """The command that a request was made with."""
    where = f" --{mode} {profile}" if mode in ("run", "batch") else ""
    return f"nemotron {title}{where} {shlex.join(overrides)}".rstrip()


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
        events = read_events(run.events)
    except Damaged as error:
        return _Opened(run, {}, None, [], str(error))
    if plan is None:
        raise UserError(Problem(f"{run.path} is not a run folder", fix="it has no plan.json"))
    return _Opened(run, plan, JobHandle(**handle) if handle else None, events)


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
        events = read_events(run.events)  # meanwhile the end may have been recorded by whoever
        if not _end_is_recorded(events):
            events += [{"time": time.time(), **event} for event in missing]
    stages = tuple(stage_view(stage, run.stage(stage["name"]), events, alive) for stage in plan["stages"])
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
