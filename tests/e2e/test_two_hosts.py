"""The command line with two hosts: the tiny model trains on both, and every way in which such a run can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron_recipes.executors.docker.executor import DockerExecutor
from nemotron_recipes.rundir import RunDir, read_json, read_jsonl
from nemotron_recipes.spec import JobHandle
from tests.helpers import two_hosts
from tests.helpers.executor_harness import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.docker, pytest.mark.long]
ROWS = "data.sources=[{path: 'sample:largest_of_three', rows: 96}]"
SFT = ("nano3", "sft", "-c", "tiny", "evaluation.rows=8", "train.micro_batch_size=16")
ENDLESS = (*SFT, "train.train_iters=100000", "checkpoint.save_interval=2")


@pytest.fixture
def pair() -> Iterator[two_hosts.Pair]:
    two_hosts.require()
    with two_hosts.pair() as made:
        yield made


@pytest.fixture
def project(pair: two_hosts.Pair, tmp_path: Path) -> Path:
    """A folder whose profile `pair` has both hosts, with prepared data."""
    pair.write_profile(tmp_path, hosts_lost_seconds=3.0)
    shown = pair.nemotron(tmp_path, "nano3", "data", "prep", "sft", "-c", "tiny", ROWS, "--run", "pair")
    assert "nano3-tiny-sft-data:v1" in shown
    assert pair.containers(1) == [], "the first host alone prepares data"
    return tmp_path


def the_run(project: Path) -> RunDir:
    """The newest SFT run."""
    (found,) = wait_for(lambda: [*project.glob("nemotron-output/runs/nano3-sft-*")])
    return RunDir(found)


def wait_for_step(run: RunDir, step: int) -> None:
    """Until it has been logged."""
    metrics = run.stage("sft").metrics
    wait_for(lambda: any(row["step"] >= step for row in read_jsonl(metrics)), 600)


def start(pair: two_hosts.Pair, project: Path, *words: str) -> subprocess.Popen[bytes]:
    """A command on the first host that is followed."""
    argv = pair.inside(0, sys.executable, "-m", "nemotron_recipes", *words)
    return subprocess.Popen(argv, cwd=project, env=pair.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def nothing_is_left(pair: two_hosts.Pair, run: RunDir) -> None:
    assert [pair.containers(host, run.path.name) for host in (0, 1)] == [[], []]
    assert not Path(f"{pair.copies}{run.path}").exists()


def test_a_model_trains_on_both_and_goes_on_after_a_wish_to_stop(pair: two_hosts.Pair, project: Path) -> None:
    shown = pair.nemotron(project, *SFT, "train.train_iters=4", "--run", "pair", "--dry-run")
    assert shown.count("docker run --detach") == 2
    assert "and on second" in shown
    attached = start(pair, project, *ENDLESS, "--run", "pair")
    run = the_run(project)
    wait_for_step(run, 3)
    attached.send_signal(signal.SIGINT)
    assert attached.wait(300) == 130
    nothing_is_left(pair, run)
    stage = run.stage("sft")
    assert stage.ranks_with_logs(1) == [0, 1]
    said = pair.nemotron(project, "runs", "logs", run.path.name, "--rank", "1")
    assert stage.log(1, 1).read_text().strip() in said
    step = int((stage.checkpoints / "latest_checkpointed_iteration.txt").read_text())
    more = f"train.train_iters={step + 2}"
    saved = f"checkpoint.load={stage.checkpoints}"
    done = pair.nemotron(project, *SFT, more, saved, "--run", "pair")
    assert f"step {step + 1}/{step + 2}" in done, "both ranks go on from the first host's checkpoint"
    (made,) = json.loads(pair.python(project, "-m", "nemotron_recipes", "artifacts", "list", "--json").stdout)[:1]
    assert made


def test_a_detached_run_is_cancelled_on_both(pair: two_hosts.Pair, project: Path) -> None:
    pair.nemotron(project, *ENDLESS, "--batch", "pair")
    run = the_run(project)
    wait_for(lambda: all(pair.containers(host, run.path.name) for host in (0, 1)))
    pair.nemotron(project, "runs", "cancel", run.path.name)
    assert [*read_jsonl(run.events)][-1]["event"] == "cancelled"
    nothing_is_left(pair, run)


def test_a_host_that_is_gone_ends_the_run_and_is_named(pair: two_hosts.Pair, project: Path) -> None:
    attached = start(pair, project, *ENDLESS, "--run", "pair")
    run = the_run(project)
    wait_for(lambda: any(event["event"] == "stage-started" for event in read_jsonl(run.events)), 300)
    pair.stop_sshd()
    assert attached.wait(300) == 1
    end = [*read_jsonl(run.events)][-1]
    assert end["cause"].startswith("second: can't be reached any more")
    assert pair.containers(0, run.path.name) == []
    assert pair.containers(1, run.path.name), "nobody could stop it"
    assert "second was away when the run ended" in pair.nemotron(project, "runs", "show", run.path.name)
    pair.nemotron(project, "runs", "cancel", run.path.name, code=1)
    pair.start_sshd()
    pair.nemotron(project, "runs", "cancel", run.path.name)
    nothing_is_left(pair, run)
    assert "is not running" in pair.nemotron(project, "runs", "cancel", run.path.name, code=2), "nothing is left to do"


def test_containers_that_outlive_their_driver_are_found(pair: two_hosts.Pair, project: Path) -> None:
    pair.nemotron(project, *SFT, "train.train_iters=6", "--batch", "pair")
    run = the_run(project)
    wait_for(lambda: any(event["event"] == "stage-started" for event in read_jsonl(run.events)), 300)
    handle = JobHandle(**(read_json(run.handle) or {}))
    os.kill(handle.native["pid"], signal.SIGKILL)
    assert DockerExecutor().name == handle.executor
    view = json.loads(pair.python(project, "-m", "nemotron_recipes", "runs", "show", run.path.name, "--json").stdout)
    assert view["state"] == "running"
    for host in (0, 1):
        for container in pair.containers(host, run.path.name):
            pair.daemons[host].docker("wait", container, timeout=600)
    view = json.loads(pair.python(project, "-m", "nemotron_recipes", "runs", "show", run.path.name, "--json").stdout)
    assert view["state"] == "succeeded"
    assert run.stage("sft").ranks_with_logs(1) == [0, 1]
    nothing_is_left(pair, run)
