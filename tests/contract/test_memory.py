"""Memory that a GPU shares with its host: what does not fit is refused, and what eats it up is stopped in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.records import load_run
from nemotron_recipes.executors import get_executor, memory
from nemotron_recipes.executors.memory import GIB, Memory
from nemotron_recipes.spec import Artifact, StagePlan
from tests.helpers.executor_harness import HARNESSES, placement
from tests.helpers.plans import ROOT, plan_of, probe_stage

SPARK = Memory(total=120 * GIB, available=100 * GIB, free=20 * GIB)
EXECUTORS = ["local", pytest.param("docker", marks=pytest.mark.docker)]


def stage_of(executor: str = "local", fields: dict[str, Any] | None = None, **changes: Any) -> StagePlan:
    stage = probe_stage("first", placement=placement(get_executor(executor), **(fields or {})))
    return replace(stage, config={"model": {"dtype": "bfloat16"}, "peft": None}, **changes)


def of_model(folder: Path, gib: float, **changes: Any) -> StagePlan:
    """A training stage of a model whose weights are a sparse file of that size."""
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(int(gib * GIB))
    return stage_of(inputs={"model.path": Artifact("path", "model", uri=str(folder))}, **changes)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_run_that_eats_the_memory_is_stopped_while_it_can_still_save(
    executor: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if HARNESSES[executor].fixture:
        for name, value in request.getfixturevalue(HARNESSES[executor].fixture).env.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    alone = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    argv = [*alone, sys.executable, "-m", "tests.helpers.memory_box", str(tmp_path), executor]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    state, *told = json.loads(done.stdout.splitlines()[-1])
    assert state == "ended"
    assert (tmp_path / "run" / "first" / "saved").read_text() == "yes"
    (exited,) = [event for event in told if event["event"] == "stage-exited"]
    assert exited["exit_code"] == 130
    end = told[-1]
    assert (end["event"], end["scheduler"]) == ("finished", "MEMORY")
    for words in ("memory_stop_gib", "no checkpoint was saved", "lower micro_batch_size"):
        assert words in end["cause"]
    (view,) = load_run(tmp_path / "run").stages
    assert view.state == "failed"
    assert "before the machine ran out of memory" in view.explanation


def test_what_does_not_fit_is_refused_with_what_would_help(tmp_path: Path) -> None:
    fits = of_model(tmp_path / "a", 20)
    assert memory.misfit(fits, 8, "", SPARK) is None
    too_large = of_model(tmp_path / "b", 63)
    problem = memory.misfit(too_large, 8, "profile spark", SPARK)
    assert problem is not None
    assert "at least 252.0 GiB" in problem.what
    assert "train adapters" in problem.fix
    adapters = replace(too_large, config={**too_large.config, "peft": {"dim": 8}})
    assert memory.misfit(adapters, 8, "", SPARK) is None
    now_not = memory.misfit(of_model(tmp_path / "c", 26), 8, "", SPARK)
    assert now_not is not None
    assert "drop_caches" in now_not.fix, "104 of 120 GiB would fit if 100 were not all that is available"
    assert memory.misfit(of_model(tmp_path / "d", 26), 8, "", None) is None, "no Linux"


@pytest.mark.parametrize(
    ("dtype", "peft", "method", "gib"),
    [
        ("bfloat16", None, "sft", 4.0),
        ("float32", None, "sft", 8.0),
        ("bfloat16", {"dim": 4}, "dpo", 1.0),
        ("bfloat16", None, "dpo", 5.0),
    ],
)
def test_what_a_stage_takes_at_least(tmp_path: Path, dtype: str, peft: Any, method: str, gib: float) -> None:
    stage = of_model(tmp_path / "model", 1, method=method)
    stage = replace(stage, config={"model": {"dtype": dtype}, "peft": peft})
    assert memory.needed(stage) == gib * GIB


def test_a_base_in_4_bits_takes_at_least_a_quarter(tmp_path: Path) -> None:
    stage = of_model(tmp_path / "model", 8)
    config = {"model": {"dtype": "bfloat16", "load_in_4bit": True}, "peft": {"dim": 4}}
    assert memory.needed(replace(stage, config=config)) == 2 * GIB


def test_a_hub_model_counts_where_it_is_in_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--org--name" / "snapshots" / "c0ffee"
    of_model(folder, 2)
    hub = stage_of(inputs={"model.path": Artifact("hub", "model", "org/name", revision="c0ffee")})
    assert memory.needed(hub, {"HF_HOME": str(tmp_path)}) == 8 * GIB
    assert memory.needed(hub, {"HF_HOME": str(tmp_path / "nothing")}) is None


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    stage = of_model(tmp_path / "model", 4_000, fields={"memory_reserve_gib": 4.0})
    (problem,) = get_executor("local").preflight(plan_of(tmp_path / "run", stage))
    assert "kept in reserve" in problem.what
    assert "memory_reserve_gib" in problem.where
