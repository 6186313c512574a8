"""A rank that hangs on a real Slurm: seen from disk, its stacks collected on its own node, then ended or put back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.causes import diagnose
from nemotron_recipes.artifacts.records import load_run
from nemotron_recipes.errors import Problem
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import JobHandle, Launch
from tests.helpers import slurm
from tests.helpers.executor_harness import events, placement, wait_for, wait_until_over
from tests.helpers.plans import ROOT, plan_of, probe_stage, submit

pytestmark = pytest.mark.slurm

EXECUTOR = SlurmExecutor()


@pytest.fixture
def cluster(slurm_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    for name, value in (slurm_cluster.env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    return slurm_cluster


def hanging(tmp_path: Path, **options: Any) -> JobHandle:
    """Two nodes, of which the second one's rank hangs in its fourth step; only in the first attempt."""
    place = placement(EXECUTOR, nodes=2, stall_seconds=8.0, stall_factor=1.0, **options)
    run = {"id": "the-run", "stage": "first", "store": str(tmp_path / "store"), "fingerprint": "fingerprint-of-first"}
    run["dir"] = str(tmp_path / "run" / "first")
    tree = {"worker": "probe", "run": run, "inputs": {}, "outputs": [], "action": "steps", "only": 1, "hang": 4}
    arguments = ("--config", f"{run['dir']}/files/worker.json")
    files = {"worker.json": json.dumps(tree)}
    launch = Launch("tests.helpers.worker_probe", arguments, files, "torchrun")
    handle, _ = submit(
        EXECUTOR, plan_of(tmp_path / "run", replace(probe_stage("first", placement=place), launch=launch))
    )
    return handle


@pytest.mark.e2e
def test_a_rank_that_hangs_ends_the_run_with_its_stacks(cluster: slurm.Cluster, tmp_path: Path) -> None:
    handle = hanging(tmp_path, watchdog="cancel")
    wait_for(lambda: events(handle, "stalled"))
    assert wait_until_over(EXECUTOR, handle, 120) == "ended"
    (stalled,), (stacks,) = events(handle, "stalled"), events(handle, "stacks")
    assert "last step 3 of 20; rank 1 is behind the others (loading)" in stalled["words"]
    assert (stacks["ranks"], stacks["mute"]) == ([0, 1], [])
    stage = RunDir(tmp_path / "run").stage("first")
    assert "hangs_here" in stage.stacks(1, 1).read_text()
    assert "hangs_here" not in stage.stacks(1, 0).read_text()
    view = load_run(tmp_path / "run", EXECUTOR.liveness, EXECUTOR.settle)
    assert view.state == "failed"
    assert "STALLED" in str(events(handle, "finished"))
    found = diagnose(RunDir(tmp_path / "run"), "first", 1)
    assert found.cause is not None
    assert found.cause.name == "stalled"


@pytest.mark.long
@pytest.mark.e2e
def test_a_rank_that_hangs_is_put_back_and_succeeds(cluster: slurm.Cluster, tmp_path: Path) -> None:
    handle = hanging(tmp_path, watchdog="requeue", max_requeues=1)
    assert wait_until_over(EXECUTOR, handle, 180) == "ended"
    assert [(e["attempt"], e["cause"]) for e in events(handle, "requeued")] == [(1, "stalled")]
    view = load_run(tmp_path / "run", EXECUTOR.liveness, EXECUTOR.settle)
    assert (view.state, view.stage("first").attempt) == ("succeeded", 2)


@pytest.mark.long
@pytest.mark.e2e
def test_stacks_are_collected_and_the_run_let_be(cluster: slurm.Cluster, tmp_path: Path) -> None:
    handle = hanging(tmp_path, watchdog="dump")
    wait_for(lambda: events(handle, "stacks"))
    view = load_run(tmp_path / "run", EXECUTOR.liveness, EXECUTOR.settle)
    assert view.state == "stalled"
    assert "rank 1 is behind" in view.stage("first").note
    EXECUTOR.cancel(handle)
    assert len(events(handle, "stalled")) == 1, "one stall is told once"


def test_putting_back_needs_requeues(tmp_path: Path) -> None:
    place = placement(EXECUTOR, watchdog="requeue")
    (problem,) = EXECUTOR.check(plan_of(tmp_path / "run", probe_stage("first", placement=place)).stages[0])
    assert isinstance(problem, Problem)
    assert "max_requeues is 0" in problem.what
