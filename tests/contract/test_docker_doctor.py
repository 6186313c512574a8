"""What `nemotron doctor` says of this machine's docker, and of what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemotron_recipes.executors import memory
from nemotron_recipes.executors.docker import doctor
from nemotron_recipes.executors.docker.executor import DockerExecutor
from nemotron_recipes.executors.memory import GIB, Memory
from tests.helpers import docker

pytestmark = pytest.mark.docker


def look(**fields: object) -> dict[str, tuple[str, str]]:
    return {f.topic: (f.state, f.text) for f in DockerExecutor().examine(docker.profile(**fields)).findings}


def test_a_machine_with_docker(docker_daemon: docker.Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_daemon.host)
    found = look(memory_stop_gib=6.0)
    assert found["docker"][0] == "ok"
    assert docker_daemon.host in found["docker"][1]
    assert found["docker restarts"] == ("warning", 'set "live-restore": true in /etc/docker/daemon.json')
    assert found["image"][0] == "ok"
    assert "free for images" in found["docker's disk"][1]
    assert "GiB available" in found["memory"][1]
    assert found["memory watchdog"] == ("ok", "runs are stopped below 6 GiB")
    assert "nemotron images import no.such/image:1 --docker" in look(container_image="no.such/image:1")["image"][1]
    assert "docker build -t" in look(container_image="nemotron-recipes/unsloth:25.11")["image"][1]
    docker_daemon.load_foreign_image("nemotron-test:doctor", "s390x")
    state, told = look(container_image="nemotron-test:doctor")["image"]
    assert state == "problem" and told.startswith("nemotron-test:doctor: s390x, and this machine is")
    state, told = look(docker_host="unix:///nowhere")["docker"]
    assert state == "problem" and "start the daemon" in told


def test_what_a_run_would_be_refused_for(tmp_path: Path) -> None:
    found = look(docker_host=f"unix://{tmp_path}/nobody", hosts=["localhost"], mounts=["relative:/x"])
    assert found["hosts"] == (
        "problem",
        "localhost alone is one machine: leave hosts out, or name this machine and another",
    )
    assert "'relative:/x' is no mount" in found["mounts"][1]
    assert "localhost: docker" in found, "what there is is looked at all the same"


def test_the_driver_and_the_newest_cuda_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake driver's file, and a fake nvidia-smi that says what one has said on a DGX Spark."""
    fake_driver, fake_smi = tmp_path / "version", tmp_path / "bin" / "nvidia-smi"
    fake_driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05\n")
    fake_smi.parent.mkdir()
    monkeypatch.setattr(doctor, "_DRIVER", fake_driver)
    monkeypatch.setenv("PATH", str(fake_smi.parent), prepend=os.pathsep)
    nowhere = f"unix://{tmp_path}/nobody"
    for script, state, told in (
        ("echo '| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0 |'", "ok", "knows 13.0"),
        ("echo 'Failed to initialize NVML' >&2; exit 15", "problem", "not known: Failed to initialize NVML"),
    ):
        fake_smi.write_text(f"#!/bin/sh\n{script}\n")
        fake_smi.chmod(0o755)
        found = look(docker_host=nowhere)
        assert "580.95.05" in found["GPU driver"][1]
        assert found["CUDA"][0] == state
        assert told in found["CUDA"][1]


def test_a_machine_that_shares_its_memory_wants_a_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a faked product name and a faked state of the memory."""
    fake_product = tmp_path / "product_name"
    fake_product.write_text("NVIDIA DGX Spark\n")
    monkeypatch.setattr(doctor, "_PRODUCT", fake_product)
    monkeypatch.setattr(memory, "read_memory", lambda: Memory(120 * GIB, 100 * GIB, 20 * GIB))
    found = look(docker_host=f"unix://{tmp_path}/nobody")
    assert "NVIDIA DGX Spark" in found["machine"][1]
    assert found["memory"] == ("ok", "100.0 of 120.0 GiB available, 20.0 GiB without the page cache")
    assert found["page cache"][0] == "warning"
    assert "drop_caches" in found["page cache"][1]
    assert found["memory watchdog"][0] == "problem"
