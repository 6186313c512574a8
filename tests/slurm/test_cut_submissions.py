"""Submissions that are cut or killed at every step: no job twice, none nobody knows of, every handle recoverable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.executors.remote import ssh
from nemotron_recipes.executors.slurm import outcome, submission
from nemotron_recipes.rundir import RunDir, read_json, read_jsonl
from tests.helpers import slurm, sshd
from tests.helpers.cut_submission import STAGES
from tests.helpers.plans import ROOT
from tests.helpers.small_disk import small_disk

pytestmark = [pytest.mark.slurm, pytest.mark.e2e]

QUIET = 3.0  # seconds after which this cluster, which answers at once, would know of a job
REMOTE, LOCAL = ("kill", "kill-after", "cut", "cut-after", "lost"), ("kill", "kill-after", "lost")


class Trials:
    """Makes trials and judges each."""

    def __init__(self, cluster: slurm.Cluster, folder: Path, login: dict[str, Any], env: dict[str, str]):
        self.cluster, self.folder, self.login, self.number = cluster, folder, login, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.cut_submission"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def make(self, how: str, step: int) -> dict[str, Any]:
        """One trial, judged; what the submitter said of it."""
        self.number += 1
        far = self.folder / "far" / f"run-{self.number}"
        near = self.folder / "near" / far.name if self.login else far
        trial = {"how": how, "step": step, "near": str(near), "far": str(far), "login": self.login}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(trial) + "\n")
        self.process.stdin.flush()
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        self._judge(RunDir(near), told, f"{how} at step {step}: {told}")
        return told

    def _judge(self, run: RunDir, told: dict[str, Any], what: str) -> None:
        handle = slurm.wait_for(lambda: self._settled(run), f"it to be known what became of {what}")
        active = self._active(run)
        ended = outcome.has_ended(run)
        if told["code"] == 0:
            assert handle and not ended, what
        if handle and handle["native"]["jobs"].keys() == {*STAGES} and not ended:
            expected = sorted(handle["native"]["jobs"].values())
            assert active == expected, f"{what}: {active} are in the queue, the handle knows {expected}"
            # Who was not killed has said so, or how to find out: else somebody submits all of it once more.
            run_id = (read_json(run.plan) or {})["id"]
            assert told["code"] in (0, None) or run_id in told["said"], f"{what}: all jobs of {run_id} are there"
            self.cluster.run("scancel", *active)
        else:
            assert active == [], f"{what}: nobody knows of {active}"
            assert told["code"] != 0, what
        assert "Traceback" not in told["said"], what

    def _settled(self, run: RunDir) -> dict[str, Any] | None:
        """The handle once it is known what became of the submission; {} where none was written."""
        if not run.plan.exists():
            return {"native": {"jobs": {}}}
        lifecycle.load(run.path)
        handle = read_json(run.handle)
        if handle is None:
            return {"native": {"jobs": {}}}
        known = handle["native"]["tokens"].keys() <= handle["native"]["jobs"].keys()
        told = {event["stage"] for event in read_jsonl(run.events) if event["event"] == "job-accepted"}
        known = known and told == {*STAGES}  # whoever has looked has made up for what the submitter could not write
        return handle if known or outcome.has_ended(run) else None

    def _active(self, run: RunDir) -> list[str]:
        """Jobs of the run that are in the queue."""
        plan = read_json(run.plan)
        if plan is None:
            return []
        said = self.cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING", "--format=%A %j").stdout
        rows = [line.split() for line in said.splitlines()]
        return sorted(job for job, name in rows if name.startswith(f"{plan['id']}."))


@pytest.fixture
def local(slurm_cluster: slurm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trials]:
    monkeypatch.setattr(submission, "settled_seconds", lambda: QUIET)
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.env["SLURM_CONF"])
    trials = Trials(slurm_cluster, tmp_path, {}, {**os.environ})
    yield trials
    _end(trials)


@pytest.fixture
def remote(slurm_cluster: slurm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trials]:
    sshd.require()
    monkeypatch.setattr(submission, "settled_seconds", lambda: QUIET)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    with sshd.server({"SLURM_CONF": slurm_cluster.env["SLURM_CONF"], "PYTHONPATH": str(ROOT)}) as server:
        monkeypatch.setenv("HOME", str(server.home))
        login = {"tunnel": "ssh", "host": "cluster", "ssh_config": str(server.config), "remote_python": sys.executable}
        login |= {"remote_job_dir": str(tmp_path / "far")}
        trials = Trials(slurm_cluster, tmp_path, login, {**slurm.outside(), "HOME": str(server.home)})
        yield trials
        _end(trials)
        for connection in ssh._connections.values():
            connection.close()


def _end(trials: Trials) -> None:
    assert trials.process.stdin is not None and trials.process.stdout is not None
    trials.process.stdin.close()
    trials.process.wait(timeout=60)
    trials.process.stdout.close()


def _steps(trials: Trials) -> list[str]:
    """What a submission that nobody disturbs does."""
    told = trials.make("nothing", 0)
    assert told["code"] == 0, told
    return list(told["steps"])


def test_a_submission_here_that_is_broken(local: Trials) -> None:
    steps = _steps(local)
    first, second = (number for number, name in enumerate(steps, 1) if name == "submit")
    for how, step in (("kill", first), ("kill-after", second), ("lost", first), ("lost", second)):
        local.make(how, step)


def test_a_submission_over_ssh_that_is_broken(remote: Trials) -> None:
    steps = _steps(remote)
    first, second = (number for number, name in enumerate(steps, 1) if name == "submit")
    for how, step in (
        *(("kill", first), ("kill-after", first), ("kill-after", second)),
        *(("cut", first), ("cut-after", first), ("cut-after", second), ("lost", second)),
        *(("cut", second + 1), ("cut", len(steps))),  # all jobs are in the queue by then
    ):
        remote.make(how, step)


@pytest.fixture
def small_far(tmp_path: Path) -> Iterator[None]:
    """What `remote` submits to lies on a file system of 4 MiB."""
    with small_disk(tmp_path / "far", "4m"):
        yield


def test_a_disk_there_that_is_full_from_some_step_on(small_far: None, remote: Trials) -> None:
    steps = _steps(remote)
    for step in (number for number, name in enumerate(steps, 1) if name in ("submit", "write")):
        remote.make("full", step)


@pytest.mark.long
def test_a_disk_there_that_is_full_from_any_step_on(small_far: None, remote: Trials) -> None:
    for step, _ in enumerate(_steps(remote), 1):
        remote.make("full", step)


@pytest.mark.long
@pytest.mark.parametrize("where", ["local", "remote"])
def test_every_step_of_two_hundred_submissions(where: str, request: pytest.FixtureRequest) -> None:
    trials: Trials = request.getfixturevalue(where)
    steps = _steps(trials)
    hows = LOCAL if where == "local" else REMOTE
    while trials.number < 200:
        for how in hows:
            for step in range(1, len(steps) + 1):
                trials.make(how, step)
