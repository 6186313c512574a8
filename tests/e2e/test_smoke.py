"""A real smoke run, and what the plan of the whole run makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.cli import plan_text
from nemotron_recipes.planning.history import find_smoke, pace_of
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import Request
from tests.helpers.cli import nemotron
from tests.helpers.training import prepared

pytestmark = pytest.mark.e2e
WHOLE = (
    *("nano3", "sft", "-c", "tiny", "data.path=data", "train.train_iters=400", "checkpoint.save_interval=10"),
    *("train.global_batch_size=4", "train.micro_batch_size=4", "evaluation.rows=0"),
)


def test_a_smoke_run_projects_the_whole_run(tmp_path: Path) -> None:
    prepared(tmp_path / "data", "sft", train=8, held_out=4, pack_size=32)
    said = nemotron(tmp_path, *WHOLE, "--smoke", "5")
    assert "nano3-tiny-sft-smoke:v1" in said
    assert "a save, " in said and "projected    400 steps, a save every 10: " in said
    request = Request("nano3", ("sft",), "tiny", overrides=WHOLE[4:], cwd=str(tmp_path))
    prepared_plan = lifecycle.prepare(request)
    plan = prepared_plan.plan.stages[0]
    runs = tmp_path / "nemotron-output" / "runs"
    (run,) = runs.iterdir()
    time = plan.estimate["time"]
    assert (time["run"], time["smoke"], time["processes"]) == (run.name, 5, 1)
    pace = pace_of(RunDir(run), "sft")
    assert pace is not None and min(pace.step_seconds, pace.save_seconds, pace.fixed_seconds) > 0
    expected = pace.fixed_seconds + 400 * pace.step_seconds + 40 * pace.save_seconds + pace.evaluation_seconds
    assert time["seconds"] == pytest.approx(expected, rel=0.01)
    assert f"from smoke run {run.name}, 5 steps" in plan_text.describe(prepared_plan)
    assert find_smoke(runs, plan.config, 5) == run.name
    assert [path.name for path in (tmp_path / "nemotron-output" / "store").iterdir() if "sft" in path.name] == [
        "nano3-tiny-sft-smoke"
    ]
