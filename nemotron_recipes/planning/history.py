"""What earlier runs say of how long a stage takes. Reads run folders, writes nothing. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_recipes.planning.smoke import length
from nemotron_recipes.rundir import RunDir, StageDir, read_json, read_jsonl
from nemotron_recipes.spec import Placement, Tree

# Config keys that two runs must agree in for one to say how the other will behave: model, adapter, sequence, batch, and
# what the backend is told beside (gradient checkpointing, whether Unsloth is there).
ALIKE = ("method", "model", "peft", "data.pack_size", "train.micro_batch_size", "backend.name", "backend.native")
# The same of their placements: the machines, and what of them is used.
SAME_MACHINES = ("executor", "nodes", "nproc_per_node", "options.hosts", "options.docker_host", "options.gpus")

WATCHDOG = "memory_stop_gib"  # what turns the memory watchdog on, in a profile


@dataclass(frozen=True)
class Pace:
    """What a smoke run measured. Seconds; `fixed` is everything that a run does once: loading, compiling, writing."""

    run: str
    steps: int
    step_seconds: float
    save_seconds: float
    evaluation_seconds: float
    fixed_seconds: float

    def whole(self, length: Tree) -> float:
        """Seconds of a whole run: its steps, its saves and its validations (`smoke.length`)."""
        steps = length["steps"]
        saves, evaluations = (math.ceil(steps / length[key]) for key in ("save_interval", "eval_interval"))
        often = steps * self.step_seconds + saves * self.save_seconds + evaluations * self.evaluation_seconds
        return self.fixed_seconds + often


@dataclass(frozen=True)
class WallTime:
    """How long a run will take, and which run says so. `smoke`: its steps, where it was a smoke run."""

    seconds: float
    run: str
    smoke: int = 0


def wall_time(runs: Path, fingerprint: str, config: Tree, placement: Placement) -> WallTime | None:
    """From the newest whole run of the same fingerprint on as many processes, else from its newest smoke run."""
    projected: WallTime | None = None
    for run, plan in _plans(runs, fingerprint):
        for stage in plan.get("stages", ()):
            stands_for = (stage.get("stands_for") or {}).get("fingerprint")
            if fingerprint not in (stage["fingerprint"], stands_for) or not _as_many(stage, placement):
                continue
            folder = run.stage(stage["name"])
            record = _whole_record(folder)
            if record is None:
                continue
            if stage["fingerprint"] == fingerprint:
                return WallTime(record["ended"] - record["started"], plan["id"])
            if projected is None and (pace := pace_of(run, stage["name"])):
                projected = WallTime(pace.whole(length(config)), plan["id"], pace.steps)
    return projected


def find_smoke(runs: Path, config: Tree, steps: int, on: Tree | None = None) -> str | None:
    """The newest smoke run of at least `steps` steps that succeeded and agrees with `config` in the keys ALIKE.

    A bounded run in which this model, adapter and sequence length have been seen to fit, whatever the code was then.
    on: a placement; only those count that ran there, under the memory watchdog
    """
    for run, plan in _plans(runs, '"smoke"'):
        if (plan.get("request") or {}).get("smoke", 0) < steps:
            continue
        for stage in plan["stages"]:
            same = all(_at(stage["config"], key) == _at(config, key) for key in ALIKE)
            if on is not None and not _watched_on(stage["placement"], on):
                continue
            if same and _record(run.stage(stage["name"])).get("state") == "succeeded":
                return str(plan["id"])
    return None


def pace_of(run: RunDir, stage_name: str) -> Pace | None:
    """What a smoke run measured; None where it did not end in its first attempt, or saved too fast to be seen."""
    folder = run.stage(stage_name)
    plan, record = read_json(run.plan), _whole_record(folder)
    stage = next((s for s in (plan or {}).get("stages", ()) if s["name"] == stage_name), None)
    if plan is None or record is None or stage is None:
        return None
    saves = [event for event in read_jsonl(folder.events(1, 0)) if event["event"] == "checkpoint-saved"]
    steps = stage["config"]["train"]["train_iters"]
    if len(saves) < 3 or saves[-1]["step"] != steps:
        return None
    first, *between, before_last, last = saves
    timed = before_last["step"] - first["step"]
    inside = sum(save["seconds"] for save in between)
    if stage["config"]["backend"]["native"].get("checkpoint", {}).get("async_save"):
        step, save = (before_last["time"] - first["time"]) / timed, 0.0  # training goes on while it is written
    else:
        step = (before_last["time"] - before_last["seconds"] - first["time"] - inside) / timed
        save = sum(event["seconds"] for event in saves) / len(saves)
    if step <= 0:
        return None
    rest = last["step"] - before_last["step"]
    evaluation = max(0.0, last["time"] - save - before_last["time"] - rest * step)
    known = steps * step + len(saves) * save + evaluation
    fixed = max(0.0, record["ended"] - record["started"] - known)
    return Pace(plan["id"], steps, step, save, evaluation, fixed)


def _plans(runs: Path, text: str) -> Iterator[tuple[RunDir, dict[str, Any]]]:
    """Runs whose plan holds the text, newest first; most plans are never parsed."""
    found: list[tuple[float, RunDir, bytes]] = []
    for path in runs.glob("*/plan.json") if runs.is_dir() else ():
        with suppress(OSError):  # it is being removed
            raw = path.read_bytes()
            if text.encode() in raw:
                found.append((path.stat().st_mtime, RunDir(path.parent), raw))
    for _, run, raw in sorted(found, key=lambda one: one[0], reverse=True):
        with suppress(ValueError):  # damaged: `runs list` says so
            yield run, json.loads(raw)


def _watched_on(placement: Tree, wanted: Tree) -> bool:
    same = all(_at(placement, key) == _at(wanted, key) for key in SAME_MACHINES)
    return same and _at(placement, f"options.{WATCHDOG}") is not None


def _as_many(stage: dict[str, Any], placement: Placement) -> bool:
    there = stage["placement"]
    names = ("executor", "nodes", "nproc_per_node")
    return all(there[name] == getattr(placement, name) for name in names)


def _whole_record(folder: StageDir) -> dict[str, Any] | None:
    """The record of a stage that succeeded in one go."""
    record = _record(folder)
    return record if record.get("state") == "succeeded" and record.get("attempt") == 1 else None


def _record(folder: StageDir) -> dict[str, Any]:
    try:
        return read_json(folder.record) or {}
    except ValueError:
        return {}


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
