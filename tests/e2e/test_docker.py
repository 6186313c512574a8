"""The command line with executor docker: the tiny pipeline trains in containers of a real daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_recipes.rundir import read_jsonl
from tests.helpers import docker
from tests.helpers.cli import ROOT, nemotron
from tests.helpers.executor_harness import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.docker]
SMALL = ("train.train_iters=3", "evaluation.rows=8")
ROWS = "data.sources=[{path: 'sample:largest_of_three', rows: 96}]"


@pytest.fixture
def project(docker_daemon: docker.Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose profile `box` runs in containers."""
    monkeypatch.setenv("DOCKER_HOST", docker_daemon.host)
    lines = ["[box]", *(f"{key} = {json.dumps(value)}" for key, value in docker.profile().items())]
    (tmp_path / "env.toml").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_sft_trains_in_a_container(project: Path, docker_daemon: docker.Daemon) -> None:
    prep = ("nano3", "data", "prep", "sft", "-c", "tiny", ROWS)
    shown = nemotron(project, *prep, "--run", "box", "--dry-run")
    assert "docker run --detach --pull never --name nano3-data-prep-sft-tiny-" in shown
    nemotron(project, *prep, "--run", "box", "--skip-preflight")  # tested in tests/contract/test_docker_executor.py
    nemotron(project, "nano3", "sft", "-c", "tiny", *SMALL, "--run", "box", "--skip-preflight")
    view = json.loads(nemotron(project, "runs", "show", "nano3-sft", "--json"))
    (stage,) = view["stages"]
    assert (stage["state"], stage["exit_code"]) == ("succeeded", 0)
    folder = Path(view["run_dir"]) / "sft"
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row][-1] == 3
    assert json.loads((folder / "record.json").read_text())["host"] != os.uname().nodename, "a container's own name"
    assert "nano3-tiny-sft-data:v1" in nemotron(project, "lineage", "nano3-tiny-sft")
    assert containers(docker_daemon, view["id"]) == []


@pytest.mark.long
def test_a_detached_run_is_followed_and_cancelled(project: Path, docker_daemon: docker.Daemon) -> None:
    prep = (
        "nano3",
        "data",
        "prep",
        "sft",
        "-c",
        "tiny",
        "data.sources=[{path: 'sample:largest_of_three', rows: 3000000}]",
    )
    handle = json.loads(nemotron(project, *prep, "--batch", "box", "--json"))
    wait_for(lambda: containers(docker_daemon, handle["run"]))
    nemotron(project, "runs", "cancel", handle["run"])
    assert containers(docker_daemon, handle["run"]) == []
    assert json.loads(nemotron(project, "runs", "show", handle["run"], "--json"))["state"] == "cancelled"


def test_ctrl_c_stops_the_container(project: Path, docker_daemon: docker.Daemon) -> None:
    words = (
        "nano3",
        "data",
        "prep",
        "sft",
        "-c",
        "tiny",
        "data.sources=[{path: 'sample:largest_of_three', rows: 3000000}]",
    )
    attached = subprocess.Popen(
        [sys.executable, "-m", "nemotron_recipes", *words, "--run", "box", "--skip-preflight"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = wait_for(lambda: [path.name for path in project.glob("nemotron-output/runs/*")])[0]
    wait_for(lambda: containers(docker_daemon, run))
    attached.send_signal(signal.SIGINT)
    assert attached.wait(120) == 130
    assert containers(docker_daemon, run) == []


@pytest.mark.long
def test_the_whole_pipeline_learns_in_containers(project: Path) -> None:
    nemotron(project, "nano3", "pipe", "-c", "tiny", "--run", "box")
    (run, *_) = json.loads(nemotron(project, "runs", "list", "--json"))
    stages = {stage["name"]: stage for stage in run["stages"]}
    assert {stage["state"] for stage in stages.values()} == {"succeeded"}
    assert stages["sft"]["results"]["exact_match_after"] >= 0.40
    assert stages["rl"]["results"]["exact_match_after"] > stages["rl"]["results"]["exact_match_before"]


def containers(daemon: docker.Daemon, run: str) -> list[str]:
    return daemon.docker("ps", "--all", "--quiet", "--filter", f"label=nemotron.run={run}").split()
