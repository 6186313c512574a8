"""Secrets of a run whose end nobody could record."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from nemotron_recipes.executors.docker import executor as docker
from nemotron_recipes.executors.docker import files as docker_files
from nemotron_recipes.executors.docker.executor import DockerExecutor
from nemotron_recipes.executors.slurm import control
from nemotron_recipes.executors.slurm import files as slurm_files
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.rundir import RunDir, append_event, write_sealed
from nemotron_recipes.spec import JobHandle


def a_lost_run(folder: Path, native: dict[str, object]) -> tuple[RunDir, JobHandle]:
    run = RunDir(folder)
    run.path.mkdir()
    (run.path / "secrets.json").write_text(json.dumps({"HF_TOKEN": "x"}))
    os.utime(run.path / "secrets.json", (1, 1))
    stage = {"name": "sft", "reused": None, "fingerprint": "f"}
    write_sealed(run.plan, {"id": "r", "stages": [stage]})
    append_event(run.events, "submitting", attempts={"sft": 1})
    return run, JobHandle("slurm", "r", str(run.path), native)


def test_slurm_has_forgotten_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, handle = a_lost_run(tmp_path / "r", {"jobs": {"sft": "7"}, "names": {"sft": "n"}})
    slurm_files.submission(run).write_text(slurm_files.attempts_text({"sft": 1}))
    monkeypatch.setattr(control, "job_state", lambda job: None)
    os.utime(run.path / "secrets.json", (4e9, 4e9))  # newer than all events: somebody is just submitting it again
    assert SlurmExecutor().settle(handle) == [] and slurm_files.secrets(run).exists()
    os.utime(run.path / "secrets.json", (1, 1))
    assert SlurmExecutor().settle(handle) == [] and not slurm_files.secrets(run).exists()


def test_driver_and_container_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, handle = a_lost_run(tmp_path / "r", {"docker_host": "unix:///nowhere", "host": socket.gethostname()})
    monkeypatch.setattr(docker, "has_ended", lambda handle: False)
    assert DockerExecutor().settle(handle) == [] and not docker_files.secrets(run).exists()
