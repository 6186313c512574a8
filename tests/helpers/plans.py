"""Plans made by hand: stages that run probe.py, for tests of executors and of what stands above them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from nemotron_recipes.executors import Executor
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import RunDir, StageDir
from nemotron_recipes.spec import (
    Code,
    JobHandle,
    Launch,
    Placement,
    Plan,
    Rendered,
    Request,
    StagePlan,
    to_json,
)

PROBE = "tests.helpers.probe"
ROOT = Path(__file__).parents[2]  # has to be on the PYTHONPATH of what a test submits


def probe_stage(
    name: str,
    args: tuple[str, ...] = (),
    *,
    placement: Placement,
    env: dict[str, str] | None = None,
    files: dict[str, str] | None = None,
    launcher: Literal["plain", "torchrun"] = "plain",
    **orders: Any,
) -> StagePlan:
    """A stage that runs probe.py.

    orders: exit, signal, failing_rank (which of them both apply to), sleep (s), lines (how many in its
    log, five a second; -1: until a file `enough` lies in its folder), record ("succeeded", ..., or None),
    children (how many that ignore SIGTERM), deaf (it ignores SIGTERM itself),
    attempts (how many do all that; later ones succeed at once; 0: all).
    """
    fingerprint = f"fingerprint-of-{name}"
    told = {
        "exit": 0,
        "signal": 0,
        "failing_rank": "0",
        "sleep": 0,
        "lines": 0,
        "record": "succeeded",
        "children": 0,
        "deaf": False,
        "attempts": 0,
    }
    told |= orders
    told["fingerprint"] = fingerprint
    return StagePlan(
        name=name,
        words=tuple(name.split("-")),
        config_name="default",
        kind="train",
        method="sft",
        config={},
        changed={},
        inputs={},
        outputs=(),
        launch=Launch(
            "tests.helpers.probe", args, {"probe.json": json.dumps(told), **(files or {})}, launcher, env or {}
        ),
        placement=placement,
        directory="",  # set by `plan_of`
        fingerprint=fingerprint,
    )


def plan_of(run_dir: Path, *stages: StagePlan) -> Plan:
    """A Plan whose id is the folder's name, with the stages' folders in it."""
    run = RunDir(run_dir)
    placed = tuple(replace(stage, directory=str(run.stage(stage.name).path)) for stage in stages)
    return Plan(
        id=f"run-{abs(hash(str(run_dir))):x}",
        family="nano3",
        title="a plan of a test",
        request=Request("nano3", ("pipe",)),
        stages=placed,
        code=Code("sha256:0", "0"),
        run_dir=str(run_dir),
        store=str(run_dir.parent / "store"),
        created="2026-01-01T00:00:00Z",
    )


def write_run(plan: Plan, rendered: Rendered) -> None:
    """What the lifecycle does before it submits: the run folder with every file."""
    run = RunDir(Path(plan.run_dir))
    write_atomic(run.plan, to_json(plan))
    write_atomic(run.rendered, to_json(rendered))
    for stage in rendered.stages:
        StageDir(Path(stage.cwd)).path.mkdir(parents=True, exist_ok=True)
        for path, text in stage.files.items():
            write_atomic(Path(path), text)


def submit(executor: Executor, plan: Plan) -> tuple[JobHandle, Rendered]:
    """Render, write and submit."""
    rendered = executor.render(plan)
    write_run(plan, rendered)
    return executor.submit(plan, rendered), rendered
