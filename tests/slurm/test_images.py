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
from tests.helpers import slurm, sshd
from tests.helpers.cli import ROOT, nemotron
from tests.helpers.registry import registry

pytestmark = pytest.mark.slurm
HERE = architecture(platform.machine())


@pytest.fixture
def fake_enroot(tmp_path: Path) -> Path:
    """A fake of enroot, which packs a folder as a real squashfs file; it waits while the file `hold` is there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    packs = shutil.which("mksquashfs", path=f"{os.environ['PATH']}:/usr/sbin")
    (folder / "enroot").write_text(
        f"#!/bin/sh\necho \"$SLURM_JOB_PARTITION $SLURM_JOB_NAME $@\" >> '{tmp_path}/calls'\n"
        f"while [ -e '{tmp_path}/hold' ]; do sleep 0.05; done\n"
        f"exec '{packs}' '{folder}' \"$5\" -quiet -no-progress\n"
    )
    (folder / "enroot").chmod(0o755)
    return folder


def test_two_imports_at_once_on_a_node(
    slurm_cluster: slurm.Cluster, tmp_path: Path, fake_enroot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them works, as a job of the cluster's; the other takes what it has made."""
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(fake_enroot), prepend=os.pathsep)
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\naccount = "lab"\ntime = "5"\n')
    with registry(tmp_path / "registry") as made:
        digest = made.put_image("team/on-a-node", "1", "amd64", "arm64")
        words = ("images", "import", f"{made.host}/team/on-a-node:1", "--to", "images", "--run", "lab")
        argv = [sys.executable, "-m", "nemotron_recipes", *words]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        other = subprocess.Popen(argv, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True)
        said = nemotron(tmp_path, *words, "--partition", "interactive")
        told, _ = other.communicate(timeout=300)
        assert other.returncode == 0
    file = tmp_path / "images" / f"team+on-a-node+1@{digest.replace(':', '-')}.{HERE}.sqsh"
    assert said == told == f'container_image = "{file}"\n'
    assert is_whole(file)
    (call,) = (tmp_path / "calls").read_text().splitlines()
    partition, job, *arguments = call.split()
    assert partition in ("batch", "interactive")
    assert (job, arguments[:3]) == ("nemotron-images", ["import", "--arch", platform.machine()])
    assert arguments[-1] == f"docker://{made.host}#team/on-a-node:{digest}"


@pytest.mark.long
def test_an_import_from_a_laptop_outlives_its_connection(
    slurm_cluster: slurm.Cluster, tmp_path: Path, fake_enroot: Path
) -> None:
    """On a node of the cluster behind a login node; who asks again waits for it, and gets what it has made."""
    sshd.require()
    laptop, images = tmp_path / "laptop", tmp_path / "all nodes see it"
    laptop.mkdir()
    (tmp_path / "hold").touch()
    python = fake_enroot / "login_python"  # where a site's profile would set the search path
    python.write_text(f"#!/bin/sh\nPATH='{fake_enroot}':$PATH exec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    sessions = {"SLURM_CONF": slurm_cluster.env["SLURM_CONF"]}
    with sshd.server(sessions) as server, registry(tmp_path / "registry") as made:
        (laptop / "env.toml").write_text("[far]\n" + server.profile(tmp_path / "far", remote_python=str(python)))
        digest = made.put_image("team/far", "1", "amd64", "arm64")
        command = (sys.executable, "-m", "nemotron_recipes", "images", "import", f"{made.host}/team/far:1")
        environ = {**slurm.outside(), "HOME": str(server.home), "PYTHONPATH": str(ROOT)}

        def begin(target: str) -> subprocess.Popen[str]:
            pipe = subprocess.PIPE
            argv = (*command, "--run", "far", "--partition", "interactive", "--to", target)
            return subprocess.Popen(argv, cwd=laptop, env=environ, stdout=pipe, stderr=pipe, text=True)

        relative, lost = begin("images"), begin(str(images))
        slurm.wait_for(lambda: (tmp_path / "calls").exists() or lost.poll() is not None, "enroot to start")
        assert lost.poll() is None, lost.communicate()
        server.cut()
        said = lost.communicate(timeout=120)
        assert lost.returncode == 2 and "the same command again waits for it" in said[1], said
        assert "must be a full one" in relative.communicate(timeout=120)[1] and relative.returncode == 2
        again = begin(str(images))
        (tmp_path / "hold").unlink()
        out, err = again.communicate(timeout=300)
        assert again.returncode == 0, err + server.log()
    file = images / f"team+far+1@{digest.replace(':', '-')}.{HERE}.sqsh"
    assert out == f'container_image = "{file}"\n' and is_whole(file)
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("interactive nemotron-images import --arch ")
    assert not [*images.glob("*.partial")] and not (laptop / "images").exists()
