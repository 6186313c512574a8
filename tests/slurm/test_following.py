"""Runs on a real Slurm, followed with the command line: the queue, the logs, Ctrl-C, a Slurm that does not answer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.rundir import RunDir, append_event
from nemotron_recipes.spec import JobHandle
from tests.helpers import slurm
from tests.helpers.executor_harness import placement, wait_for
from tests.helpers.plans import ROOT, plan_of, probe_stage, submit

pytestmark = pytest.mark.slurm

EXECUTOR = SlurmExecutor()
HELD = {"hold": True}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("NEMOTRON_ENV", raising=False)


@pytest.fixture
def cluster(slurm_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    return slurm_cluster


class Command:
    """`nemotron ...` in a folder, whose words are read while it runs."""

    def __init__(self, cwd: Path, *words: str):
        self.output = cwd / f"said-{'-'.join(words[:2])}-{len(list(cwd.glob('said-*')))}.txt"
        with open(self.output, "w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nemotron_recipes", *words],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.output.read_text()

    def says(self, words: str, seconds: float = 120) -> None:
        slurm.wait_for(lambda: words in self.said, f"{words!r} in {self.output}:\n{self.said}", seconds)

    def interrupt(self) -> None:
        """Ctrl-C reaches all processes of the terminal's foreground."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, code: int, seconds: float = 120) -> str:
        assert self.process.wait(timeout=seconds) == code, self.said
        return self.said


@contextlib.contextmanager
def silent(cluster: slurm.Cluster) -> Iterator[None]:
    """slurmctld takes connections and answers none."""
    told = slurm.manage("status", folder=cluster.folder).stdout
    (pid,) = (int(line.split()[1]) for line in told.splitlines() if line.startswith("slurmctld "))
    daemon = psutil.Process(pid)
    daemon.suspend()
    try:
        yield
    finally:
        daemon.resume()


def submitted(tmp_path: Path, *stages: Any) -> JobHandle:
    """A run where the command line finds it from `tmp_path`."""
    plan = plan_of(tmp_path / "nemotron-output" / "runs" / "run", *stages)
    run = RunDir(Path(plan.run_dir))
    run.path.mkdir(parents=True)
    append_event(run.events, "submitted", executor="slurm", mode="batch")
    return submit(EXECUTOR, plan)[0]


def test_the_queue_then_the_log_then_the_exit_code(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """And a follower that was killed is no loss: the next one shows all of it."""
    place = placement(EXECUTOR, additional_parameters=HELD)
    handle = submitted(tmp_path, probe_stage("first", placement=place, lines=10, exit=7, record=None))
    following = Command(tmp_path, "runs", "logs", "-f", "run")
    job = handle.native["jobs"]["first"]
    following.says(f"first is job {job}, PENDING: it is held by its owner (JobHeldUser)")
    why = Command(tmp_path, "runs", "explain", "run").end(0)
    assert f"first waits (job {job}): it is held by its owner (JobHeldUser)" in why
    assert f"scontrol release {job}" in why
    cluster.run("scontrol", "release", job)
    following.says("line 1 of rank 0")
    following.process.kill()
    said = Command(tmp_path, "runs", "logs", "-f", "run").end(1)
    assert [f"line {number} of rank 0" in said for number in range(10)] == [True] * 10
    assert "exit code 7" in said


def test_all_ranks_are_shown_with_their_names(cluster: slurm.Cluster, tmp_path: Path) -> None:
    place = placement(EXECUTOR, nodes=2)
    submitted(tmp_path, probe_stage("first", placement=place, launcher="torchrun", lines=3))
    said = Command(tmp_path, "runs", "logs", "-f", "--all-ranks", "run").end(0)
    for rank in (0, 1):
        assert f"[rank {rank}] line 2 of rank {rank}" in said
    assert "[rank 1] line 0" in Command(tmp_path, "runs", "logs", "--all-ranks", "run").end(0)
    alone = Command(tmp_path, "runs", "logs", "--rank", "1", "run").end(0)
    assert "line 2 of rank 1" in alone
    assert "rank 0" not in alone
    assert "there are ranks [0, 1]" in Command(tmp_path, "runs", "logs", "--rank", "2", "run").end(2)


def test_ctrl_c_leaves_the_run_and_a_second_one_cancels_it(cluster: slurm.Cluster, tmp_path: Path) -> None:
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\naccount = "lab"\ntime = 5\n')
    words = ("nano3", "data", "prep", "sft", "-c", "tiny", "--run", "lab")
    first = Command(tmp_path, *words, "run.additional_parameters={hold: true}")
    first.says("PENDING")
    first.interrupt()
    said = first.end(130)
    (run,) = (tmp_path / "nemotron-output" / "runs").iterdir()
    assert f"come back  nemotron runs logs -f {run.name}" in said
    queue = ("squeue", "--noheader", f"--name={run.name}.data-prep-sft", "--format=%T")
    assert cluster.run(*queue).stdout.strip() == "PENDING", "it goes on"

    assert "cancelled" in Command(tmp_path, "runs", "cancel", run.name).end(0)
    second = Command(tmp_path, *words, "--force", "run.additional_parameters={hold: true}")
    second.says("PENDING")
    second.interrupt()
    second.says("within 3 s")
    second.interrupt()
    assert "cancelled" in second.end(130)
    sweep = Command(tmp_path, *words, "data.pack_size=128,256", "--multirun", "run.additional_parameters={hold: true}")
    sweep.says("pending    data.pack_size=256")
    sweep.interrupt()
    sweep.says("within 3 s")
    sweep.interrupt()
    assert "stopping the runs" in sweep.end(130)
    assert cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING", "--format=%i").stdout == ""


def test_waiting_quietly(cluster: slurm.Cluster, tmp_path: Path) -> None:
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\naccount = "lab"\ntime = 5\n')
    words = ("nano3", "data", "prep", "sft", "-c", "tiny")
    good = Command(tmp_path, *words, "--sample", "40", "--batch", "lab", "--wait").end(0)
    assert "nemotron runs logs -f" in good
    assert "rows read" not in good
    assert "succeeded" in good
    bad = Command(tmp_path, *words, "data.sources=[{path: env.toml}]", "--batch", "lab", "--wait").end(1)
    assert "failed" in bad
    assert "--batch PROFILE" in Command(tmp_path, *words, "--run", "lab", "--wait").end(2)


def test_a_shell_where_the_run_is(cluster: slurm.Cluster, tmp_path: Path) -> None:
    handle = submitted(tmp_path, probe_stage("first", placement=placement(EXECUTOR), sleep=120))
    job = handle.native["jobs"]["first"]
    refused = Command(tmp_path, "runs", "shell", "run", "--stage", "second").end(2)
    assert "no stage 'second'" in refused
    wait_for(lambda: (tmp_path / "nemotron-output/runs/run/first/received-0.json").exists())
    said = Command(tmp_path, "runs", "shell", "run", "--", "sh", "-c", "echo job $SLURM_JOB_ID in $PWD; exit 5").end(5)
    assert f"job {job} in {tmp_path / 'nemotron-output/runs/run'}" in said
    EXECUTOR.cancel(handle)
    assert "it is cancelled" in Command(tmp_path, "runs", "shell", "run").end(2)


def test_slurm_does_not_answer_for_a_while(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """The log goes on, and the end is known, from the run folder alone."""
    handle = submitted(tmp_path, probe_stage("first", placement=placement(EXECUTOR), lines=-1))
    following = Command(tmp_path, "runs", "logs", "-f", "run")
    following.says("line 2 of")
    with silent(cluster):
        following.says("Slurm does not answer")
        said = following.said.count("line ")
        slurm.wait_for(lambda: following.said.count("line ") > said, "more of the log")
        (Path(handle.run_dir) / "first" / "enough").touch()
        following.end(0)


@pytest.mark.long
def test_slurm_is_silent_for_a_minute_and_then_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.require()
    with slurm.cluster("--nodes=1", "--account=lab") as cluster:
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        submitted(tmp_path, probe_stage("first", placement=placement(EXECUTOR), lines=600))
        following = Command(tmp_path, "runs", "logs", "-f", "run")
        following.says("line 2 of")
        with silent(cluster):
            following.says("Slurm does not answer")
            following.says("line 300 of")  # a minute later
        following.says("Slurm answers again")
        cluster.run("scontrol", "shutdown", "slurmctld")
        slurm.manage("start-daemon", "slurmctld", folder=cluster.folder)
        following.says("line 599 of", 200)
        following.end(0)
