"""What is different today, when a plan is made once more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemotron_recipes.planning.again import profile_differences
from nemotron_recipes.spec import Placement
from tests.helpers.plans import plan_of, probe_stage


def test_a_profile_that_says_something_else_now_is_told(tmp_path: Path) -> None:
    options = {"container_image": "trainer:1", "partition": "gpu", "time": "04:00:00"}
    stages = [probe_stage(name, placement=Placement("slurm", "site", 1, 1, options)) for name in ("sft", "rl")]
    plan = plan_of(tmp_path, *stages)
    plan = replace(plan, request=replace(plan.request, profile="site", overrides=("run.time=04:00:00",)))
    today = {"executor": "slurm", "container_image": "trainer:2", "partition": "gpu", "time": "01:00:00"}
    assert profile_differences(plan, today) == [
        "container_image of profile site is 'trainer:2' in env.toml now; the rerun keeps 'trainer:1'"
    ]
