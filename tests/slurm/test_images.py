"""`nemotron images import` on a node of a real Slurm, with a stand-in for enroot and a real registry."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_recipes.executors.images.enroot import architecture
from nemotron_recipes.executors.images.squashfs import is_whole
from tests.helpers import slurm
from tests.helpers.cli import ROOT, nemotron
from tests.helpers.registry import registry

pytestmark = pytest.mark.slurm


def test_two_imports_at_once_on_a_node(
    slurm_cluster: slurm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them works, as a job of the cluster's; the other takes what it has made."""
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    fake_enroot = tmp_path / "bin" / "enroot"
    fake_enroot.parent.mkdir()
    packs = shutil.which("mksquashfs", path=f"{os.environ['PATH']}:/usr/sbin")
    fake_enroot.write_text(
        f"#!/bin/sh\necho \"$SLURM_JOB_PARTITION $SLURM_JOB_NAME $@\" >> '{tmp_path}/calls'\n"
        f"exec '{packs}' '{fake_enroot.parent}' \"$5\" -quiet -no-progress\n"
    )
    fake_enroot.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake_enroot.parent), prepend=os.pathsep)
    profile = '[lab]\nexecutor = "slurm"\naccount = "lab"\ntime = "5"\n'
    (tmp_path / "env.toml").write_text(f'{profile}[far]\nexecutor = "slurm"\ntunnel = "ssh"\nhost = "x"\n')
    with registry(tmp_path / "registry") as made:
        digest = made.put_image("team/on-a-node", "1", "amd64", "arm64")
        words = ("images", "import", f"{made.host}/team/on-a-node:1", "--to", "images", "--run", "lab")
        argv = [sys.executable, "-m", "nemotron_recipes", *words]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        other = subprocess.Popen(argv, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True)
        said = nemotron(tmp_path, *words, "--partition", "interactive")
        told, _ = other.communicate(timeout=300)
        assert other.returncode == 0
        nemotron(tmp_path, *words[:-1], "far", code=2)
    file = tmp_path / "images" / f"team+on-a-node+1@{digest.replace(':', '-')}.{architecture(platform.machine())}.sqsh"
    assert said == told == f'container_image = "{file}"\n'
    assert is_whole(file)
    (call,) = (tmp_path / "calls").read_text().splitlines()
    partition, job, *arguments = call.split()
    assert partition in ("batch", "interactive")
    assert (job, arguments[:3]) == ("nemotron-images", ["import", "--arch", platform.machine()])
    assert arguments[-1] == f"docker://{made.host}#team/on-a-node:{digest}"
