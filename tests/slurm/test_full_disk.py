"""A run whose output folder fills up: a small file system of its own, real training, a real Slurm."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.records import load_run
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.rundir import RunDir, latest_checkpoint, read_json
from nemotron_recipes.spec import Launch
from nemotron_recipes.worker.trl.checkpoints import checkpoint_to_resume, staging_folder
from tests.helpers import slurm
from tests.helpers.executor_harness import placement, wait_until_over
from tests.helpers.plans import ROOT, plan_of, probe_stage, submit
from tests.helpers.small_disk import small_disk
from tests.helpers.training import events as worker_events
from tests.helpers.training import losses, prepared, worker_file

pytestmark = pytest.mark.slurm

EXECUTOR = SlurmExecutor()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB: three checkpoints of the tiny model and what lies around them, not four."""
    with small_disk(tmp_path / "small", "24m") as folder:
        yield folder


@pytest.mark.long
@pytest.mark.e2e
def test_the_output_folder_fills_up_during_a_checkpoint(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.require()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = prepared(tmp_path / "data", "sft")
    sections: dict[str, Any] = {"evaluation": {"rows": 0}, "checkpoint": {"save_interval": 1, "keep": 100}}
    path = worker_file(disk / "run" / "sft", data, **sections, train={"train_iters": 6})
    launch = Launch("nemotron_recipes.worker", ("--config", str(path)), {"train.yaml": path.read_text()})
    with slurm.cluster("--nodes=1", "--account=lab") as cluster:  # its nodes see what was mounted before
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        stage = replace(probe_stage("sft", placement=placement(EXECUTOR)), launch=launch)
        plan = plan_of(disk / "run", stage)
        handle, rendered = submit(EXECUTOR, plan)
        assert wait_until_over(EXECUTOR, handle, 180) == "ended"
        view = load_run(disk / "run", EXECUTOR.liveness, EXECUTOR.settle)
        folder = RunDir(disk / "run").stage("sft")
        newest = latest_checkpoint(folder.checkpoints)
        assert newest is not None
        assert view.state == "failed"
        assert "no room is left" in view.explanation
        assert f"{newest} is whole" in view.explanation
        assert "train.resume=true" in view.explanation
        assert "Traceback" not in folder.log(1, 0).read_text()
        assert (read_json(folder.record) or {})["state"] == "failed", "there was room for the end"
        assert checkpoint_to_resume(None, folder.checkpoints, attempt=2) == newest
        assert not staging_folder(folder.checkpoints).exists()

        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        handle = EXECUTOR.submit(plan, rendered)
        assert wait_until_over(EXECUTOR, handle, 180) == "ended"
        assert load_run(disk / "run", EXECUTOR.liveness, EXECUTOR.settle).state == "succeeded"
        ready = next(event for event in worker_events(folder.path, 2) if event["event"] == "ready")
        assert ready["resume_from"] == str(newest)
        assert len(losses(folder.path)) == 6
