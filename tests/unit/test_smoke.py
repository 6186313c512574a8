"""Smoke runs: what they change, what is read from them, and what a later plan makes of it."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemotron_recipes.config.catalog import Catalog, package_root
from nemotron_recipes.config.profiles import Environment
from nemotron_recipes.errors import UserError
from nemotron_recipes.planning.history import find_smoke, pace_of, wall_time
from nemotron_recipes.planning.plan import make_plan
from nemotron_recipes.rundir import TRACKER, RunDir, append_event, write_record
from nemotron_recipes.seals import opened_line
from nemotron_recipes.spec import Placement, Request

CATALOG = Catalog((package_root(),))
HERE = Placement("local", None, 1, 1)


def planned(folder: Path, family: str, words: tuple[str, ...], config: str, *overrides: str, smoke: int = 0) -> Any:
    (folder / "packs").mkdir(exist_ok=True)
    (folder / "base" / "iter_0000000").mkdir(parents=True, exist_ok=True)
    (folder / "base" / TRACKER).write_text("0")
    request = Request(
        family, words, config, overrides=("data.path=packs", *overrides), offline=True, cwd=str(folder), smoke=smoke
    )
    return make_plan(request, CATALOG, Environment(folder)).stages[0]


@pytest.mark.parametrize(
    ("family", "words", "config", "overrides", "file", "steps", "saves"),
    [
        ("nano3", ("sft",), "tiny", (), "train.yaml", "trainer.max_steps", "trainer.save_steps"),
        (
            *("nano3", ("sft",), "default"),
            ("checkpoint.pretrained_checkpoint=base", "parallel.expert_model_parallel_size=1"),
            *("megatron.yaml", "train.train_iters", "checkpoint.save_interval"),
        ),
        (
            *("r1-qwen3-8b", ("lora",), "default", (), "automodel.yaml"),
            *("step_scheduler.max_steps", "step_scheduler.ckpt_every_steps"),
        ),
    ],
)
def test_every_backend_gets_the_few_steps_and_saves(
    tmp_path: Path, family: str, words: Any, config: str, overrides: Any, file: str, steps: str, saves: str
) -> None:
    stage = planned(tmp_path, family, words, config, *overrides, smoke=10)
    tree = yaml.safe_load(stage.launch.files[file])

    def at(key: str) -> Any:
        node = tree
        for part in key.split("."):
            node = node[part]
        return node

    assert (at(steps), at(saves)) == (10, 4)
    assert stage.config["scheduler"]["lr_warmup_iters"] < 10
    assert [output.name.endswith("-smoke") for output in stage.outputs] == [True]
    assert str(stage.changed["train.train_iters"]) == "command line --smoke 10"
    whole = planned(tmp_path, family, words, config, *overrides)
    assert stage.stands_for["fingerprint"] == whole.fingerprint != stage.fingerprint
    assert stage.stands_for["steps"] == whole.config["train"]["train_iters"]
    assert whole.stands_for == {}


def test_a_smoke_run_starts_anew_and_is_shorter(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        planned(tmp_path, "nano3", ("sft",), "tiny", "train.resume=true", "train.train_iters=8", smoke=8)
    assert [p.what.partition(",")[0] for p in refused.value.problems] == [
        "a smoke run starts anew",
        "--smoke 8 is no shorter than the run: train.train_iters is 8",
    ]


def made_run(runs: Path, name: str, stage: Any, smoke: int, state: str = "succeeded", attempt: int = 1) -> RunDir:
    """A run folder as a smoke run of 10 steps leaves it: 7 s a step, 3 s a save, 5 s a validation, 20 s once."""
    run = RunDir(runs / name)
    run.path.mkdir(parents=True)
    planned_stage = {
        "name": "sft",
        "fingerprint": stage.fingerprint,
        "stands_for": stage.stands_for,
        "config": stage.config,
        "placement": {"executor": "local", "nodes": 1, "nproc_per_node": 1},
    }
    run.plan.write_text(json.dumps({"id": name, "stages": [planned_stage], "request": {"smoke": smoke}}))
    folder = run.stage("sft")
    began = now = 1000.0
    now += 12  # loading
    for step in range(1, stage.config["train"]["train_iters"] + 1):
        now += 7
        if step == stage.config["train"]["train_iters"]:
            now += 5
        if step % 4 == 0 or step == 10:
            now += 3
            append_event(folder.events(1, 0), "checkpoint-saved", step=step, seconds=3.0)
            lines = folder.events(1, 0).read_text().splitlines()
            event = {**opened_line(lines[-1])[0], "time": now}
            folder.events(1, 0).write_text("\n".join([*lines[:-1], json.dumps(event)]) + "\n")
    write_record(folder, {"state": state, "attempt": attempt, "started": began, "ended": now + 8})
    return run


def test_what_a_smoke_run_measures(tmp_path: Path) -> None:
    stage = planned(tmp_path, "nano3", ("sft",), "tiny", smoke=10)
    run = made_run(tmp_path / "runs", "smoke-1", stage, 10)
    pace = pace_of(run, "sft")
    assert pace is not None
    measured = (pace.step_seconds, pace.save_seconds, pace.evaluation_seconds, pace.fixed_seconds)
    assert measured == pytest.approx((7, 3, 5, 20))
    # A projection without saves would be 15 s of 95 s short here.
    assert pace.whole({"steps": 10, "save_interval": 2, "eval_interval": 5}) == pytest.approx(20 + 70 + 15 + 10)
    lines = (folder := run.stage("sft")).events(1, 0).read_text().splitlines()
    folder.events(1, 0).write_text("\n".join(lines[1:]) + "\n")
    assert pace_of(run, "sft") is None, "a save that was not seen"


def test_a_later_plan_takes_its_time_from_the_newest_run_that_says_it(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    whole = planned(tmp_path, "nano3", ("sft",), "tiny", "train.train_iters=100", "checkpoint.save_interval=10")
    smoke = planned(
        tmp_path, "nano3", ("sft",), "tiny", "train.train_iters=100", "checkpoint.save_interval=10", smoke=10
    )
    ask = (runs, whole.fingerprint, whole.config, HERE)
    assert wall_time(*ask) is None
    made_run(runs, "smoke-1", smoke, 10)
    found = wall_time(*ask)
    assert found is not None and (found.run, found.smoke) == ("smoke-1", 10)
    assert found.seconds == pytest.approx(20 + 100 * 7 + 10 * 3 + 5)
    assert wall_time(runs, whole.fingerprint, whole.config, Placement("local", None, 1, 2)) is None, "other processes"
    real = made_run(runs, "whole-1", whole, 0)
    os.utime(real.plan, (1, 1))  # an older whole run says more than a newer smoke run
    found = wall_time(*ask)
    assert found is not None and (found.run, found.smoke) == ("whole-1", 0)
    write_record(real.stage("sft"), {"state": "failed", "attempt": 1, "started": 0.0, "ended": 1.0})
    (runs / "damaged").mkdir()
    (runs / "damaged" / "plan.json").write_text(whole.fingerprint)
    real.stage("sft").record.write_text("{")
    found = wall_time(*ask)
    assert found is not None and found.run == "smoke-1"


def test_a_smoke_run_of_the_same_model_adapter_and_sequence_is_found(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    overrides = ("r1-qwen3-8b", ("lora",), "default")
    whole, smoke = planned(tmp_path, *overrides), planned(tmp_path, *overrides, smoke=10)
    assert find_smoke(runs, whole.config, 10) is None
    made_run(runs, "failed", smoke, 10, state="failed")
    assert find_smoke(runs, whole.config, 10) is None
    made_run(runs, "good", smoke, 10)
    assert find_smoke(runs, whole.config, 10) == "good"
    assert find_smoke(runs, whole.config, 50) is None, "too short"
    for key in ("data.pack_size", "peft.dim", "model.path", "backend.native"):  # native: gradient checkpointing off
        section, name = key.split(".")
        other = copy.deepcopy(whole.config)
        other[section][name] = "another"
        assert find_smoke(runs, other, 10) is None, key
    other = copy.deepcopy(whole.config)
    other["optimizer"]["lr"] = 1.0
    assert find_smoke(runs, other, 10) == "good"


def test_a_recipe_that_may_not_fit_wants_a_smoke_run_under_the_watchdog_first(tmp_path: Path) -> None:
    """Refused without the watchdog, and without a run of that length; the smoke run itself may go."""
    qlora = ("super3", ("sft",), "spark-qlora")
    with pytest.raises(UserError, match="runs under the memory watchdog alone") as refused:
        planned(tmp_path, *qlora, smoke=50)
    assert "memory_stop_gib" in str(refused.value)
    watched = "run.memory_stop_gib=6.0"
    with pytest.raises(UserError, match="run the same command with --smoke 50 first"):
        planned(tmp_path, *qlora, watched)
    smoke = planned(tmp_path, *qlora, watched, smoke=50)
    runs = tmp_path / "nemotron-output" / "runs"
    blind = made_run(runs, "unwatched", smoke, 50)
    with pytest.raises(UserError, match="--smoke 50 first"):
        planned(tmp_path, *qlora, watched)
    plan = json.loads(blind.plan.read_text())
    plan["stages"][0]["placement"]["options"] = {"memory_stop_gib": 6.0}
    blind.plan.write_text(json.dumps(plan))
    assert planned(tmp_path, *qlora, watched).config["train"]["train_iters"] == 500
    with pytest.raises(UserError, match="--smoke 50 first"):
        planned(tmp_path, *qlora, watched, "peft.dim=64")
    for elsewhere in ({"executor": "docker"}, {"options": {"memory_stop_gib": 6.0, "hosts": ["spark1", "spark2"]}}):
        other = json.loads(json.dumps(plan))
        other["stages"][0]["placement"] |= elsewhere
        blind.plan.write_text(json.dumps(other))
        with pytest.raises(UserError, match="--smoke 50 first"):
            planned(tmp_path, *qlora, watched)
