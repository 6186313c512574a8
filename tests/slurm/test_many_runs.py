"""Many runs on a real Slurm: submitted at once, listed with one question, whatever state their jobs are in."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.executors.slurm import control
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.rundir import RunDir, append_event
from tests.helpers import slurm
from tests.helpers.executor_harness import placement
from tests.helpers.plans import ROOT, plan_of, probe_stage, write_run

pytestmark = pytest.mark.slurm

EXECUTOR = SlurmExecutor()
AT_ONCE = 50


@pytest.fixture
def cluster(slurm_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    control._silent.clear()
    return slurm_cluster


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that names each of Slurm's commands that is asked; they are the real ones."""
    log, folder = tmp_path / "asked.txt", tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "sacct", "scontrol"):
        program = folder / name
        real = shutil.which(name)
        program.write_text(f'#!/bin/sh\necho {name} >> "{log}"\nexec {real} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin")
    return log


def test_fifty_submissions_at_once_and_their_list(cluster: slurm.Cluster, tmp_path: Path, asked: Path) -> None:
    """Each gets a job of its own, which carries its name; a list of all of them is one question to each source."""
    held = placement(EXECUTOR, additional_parameters={"hold": True})
    plans = [plan_of(tmp_path / "runs" / f"run-{n}", probe_stage("first", placement=held)) for n in range(AT_ONCE)]
    rendered = [EXECUTOR.render(plan) for plan in plans]
    for plan, text in zip(plans, rendered, strict=True):
        write_run(plan, text)
        append_event(RunDir(Path(plan.run_dir)).events, "submitted", executor="slurm", mode="batch")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        handles = [*pool.map(EXECUTOR.submit, plans, rendered)]
    jobs = [handle.native["jobs"]["first"] for handle in handles]
    try:
        assert len({*jobs}) == AT_ONCE
        queue = dict(line.split() for line in cluster.run("squeue", "--noheader", "--format=%i %j").stdout.splitlines())
        assert {job: queue[job] for job in jobs} == {
            job: f"{plan.id}.first" for job, plan in zip(jobs, plans, strict=True)
        }

        asked.unlink()
        views = lifecycle.newest_runs(tmp_path / "runs", None)
        assert [view.state for view in views] == ["pending"] * AT_ONCE
        assert asked.read_text().split() == ["squeue", "sacct"]
    finally:
        cluster.run("scancel", *jobs)
    for job in jobs:
        cluster.wait(job)
    views = lifecycle.newest_runs(tmp_path / "runs", None)
    assert {view.state for view in views} == {"cancelled"}
    asked.unlink()
    assert {view.state for view in lifecycle.newest_runs(tmp_path / "runs", None)} == {"cancelled"}
    assert not asked.exists(), "their ends are in the run folders now"
