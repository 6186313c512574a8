"""Telling W&B what is missing of the runs here."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.lifecycle.runs import load
from nemotron_recipes.mirror.journal import Journal, pending, unmark
from nemotron_recipes.mirror.sync import Outcome, replay_all
from nemotron_recipes.rundir import Damaged, RunDir


def mirror(output: Path) -> list[Outcome]:
    """Tell W&B what is missing of every run below `output`, oldest first."""
    active = set()
    for name in pending(output):
        journal = Journal(output / "runs" / name)
        with suppress(Damaged):  # told below, as the reason why W&B hears nothing of it
            if journal.target is not None and RunDir(journal.run_dir).plan.exists():
                view = load(journal.run_dir)
                _note_what_is_missing(journal, view)
                if view.state in ("running", "stalled", "pending"):
                    active.add(name)
    outcomes = replay_all(output, active)
    for outcome in outcomes:
        if not outcome.left and not outcome.why and outcome.run not in active:
            unmark(output, outcome.run)
    return outcomes


def _note_what_is_missing(journal: Journal, view: RunView) -> None:
    """What no worker could note: it was killed, its machine died, or the disk was full. The records are the truth."""
    for stage in view.stages:
        if stage.state == "succeeded":
            known = {entry["key"] for entry in journal.entries()}
            if f"ended {stage.name} {stage.attempt}" not in known:
                journal.started(stage.name, stage.attempt, stage.parents)
                for slot, made in stage.outputs.items():
                    journal.output(stage.name, slot, made["name"], made["version"])
                journal.ended(stage.name, stage.attempt, stage.state, stage.exit_code or 0, stage.results)
    known = {entry["key"] for entry in journal.entries()}
    for stage in view.stages:
        began, ended = (f"{word} {stage.name} {stage.attempt}" for word in ("started", "ended"))
        if began in known and ended not in known and stage.state in ("failed", "cancelled", "lost"):
            code = stage.exit_code if stage.exit_code is not None else 1
            journal.ended(stage.name, stage.attempt, stage.state, code, stage.results)
