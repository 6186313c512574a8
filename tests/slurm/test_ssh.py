"""A cluster behind a real sshd: the same commands from a machine that has neither Slurm nor the cluster's folders."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.executors import replica, slurm_handle
from nemotron_recipes.executors.transport import Here, Unreachable
from nemotron_recipes.rundir import RunDir, read_json, read_jsonl, write_sealed
from nemotron_recipes.spec import JobHandle
from tests.helpers import slurm, sshd
from tests.helpers.plans import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.e2e]


@pytest.fixture(scope="module")
def server(slurm_cluster: slurm.Cluster) -> Iterator[sshd.Server]:
    """An sshd in front of the session's cluster."""
    sshd.require()
    sessions = {"SLURM_CONF": slurm_cluster.env["SLURM_CONF"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with sshd.server(sessions) as found:
        yield found


@pytest.fixture
def laptop(server: sshd.Server, tmp_path: Path) -> Laptop:
    return Laptop(server, tmp_path)


class Laptop:
    """A folder with an env.toml, and a command line that finds no Slurm of its own."""

    def __init__(self, server: sshd.Server, tmp_path: Path):
        self.server, self.folder, self.far = server, tmp_path / "laptop", tmp_path / "far"
        self.folder.mkdir()
        self.env = {**slurm.outside(), "HOME": str(server.home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.env["PATH"] = self._path(tmp_path / "bin")
        self.profile()

    def profile(self, **fields: str) -> None:
        (self.folder / "env.toml").write_text("[far]\n" + self.server.profile(self.far, **fields))

    def nemotron(self, *argv: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*argv), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.server.log()}"
        return done

    def command(self, *argv: str) -> list[str]:
        return [sys.executable, "-m", "nemotron_recipes", *argv]

    def runs(self) -> list[dict[str, Any]]:
        """What `runs list` says, newest first."""
        return list(json.loads(self.nemotron("runs", "list", "--json").stdout))

    @staticmethod
    def _path(folder: Path) -> str:
        """A PATH with what these tests need of this machine, and nothing of Slurm."""
        folder.mkdir()
        for name in ("ssh", "git", "sh", "bash", "uname"):
            found = shutil.which(name)
            if found:
                (folder / name).symlink_to(found)
        return str(folder)


def test_the_same_commands_from_a_laptop(laptop: Laptop) -> None:
    shown = laptop.nemotron(
        "nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "40", "--dry-run", "--batch", "far"
    ).stdout
    assert f"run dir   {laptop.far}/runs/" in shown and not laptop.far.exists()
    assert not (laptop.folder / "nemotron-output").exists()
    followed = laptop.nemotron("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "40", "--run", "far").stdout
    assert "rows read" in followed and "succeeded" in followed
    (prep,) = laptop.runs()
    assert prep["state"] == "succeeded"
    # The folder there is whole, and belongs to whoever looks there; here lies a copy without what is large.
    there, here = RunDir(laptop.far / "runs" / prep["id"]), RunDir(laptop.folder / "nemotron-output/runs" / prep["id"])
    assert there.plan.read_bytes() == here.plan.read_bytes()
    assert "remote" not in (read_json(there.handle) or {})["native"]
    assert (read_json(here.handle) or {})["native"]["remote"]["host"] == "cluster"
    assert list(read_jsonl(there.events)) == list(read_jsonl(here.events))
    rendered = read_json(here.rendered) or {}
    for stage in rendered["stages"]:
        for path, text in stage["files"].items():
            assert Path(path).is_relative_to(laptop.far) and Path(path).read_text() == text
    # What was made there is found there.
    again = laptop.nemotron("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "40", "--batch", "far").stdout
    assert "nothing to run" in again

    begun = laptop.nemotron(
        *(
            "nano3",
            "sft",
            "-c",
            "tiny",
            "data.path=artifact:nano3-tiny-sft-data",
            "train.train_iters=100000",
            "evaluation.rows=4",
        ),
        *("--batch", "far", "--json"),
    )
    run = json.loads(begun.stdout)["run"]
    with subprocess.Popen(
        laptop.command("runs", "logs", "-f", run), cwd=laptop.folder, env=laptop.env, stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        assert any("step " in line for line in follower.stdout)
        assert laptop.nemotron("runs", "shell", run, "--", "printenv", "SLURM_JOB_ID").stdout.strip().isdigit()
        assert laptop.runs()[0]["state"] == "running"
        assert f"{run}: running" in laptop.nemotron("runs", "explain", run).stdout
        assert "cancelled" in laptop.nemotron("runs", "cancel", run).stdout
        assert "cancelled" in follower.stdout.read()
    assert follower.returncode == 130
    assert laptop.runs()[0]["state"] == "cancelled"


def test_one_connection_serves_all_commands(laptop: Laptop) -> None:
    laptop.nemotron("doctor", "far", code=0)
    before = laptop.server.accepted
    shown = laptop.nemotron("doctor", "far").stdout
    assert laptop.server.accepted == before, "the connection of the command before is used again"
    assert "remote_job_dir on cluster writable" in shown and "partition" in shown
    folder = laptop.server.home / ".nemotron" / "ssh"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("fields", "said", "fix"),
    [
        ({"known": ""}, "its host key is not known", "compare the key's fingerprint"),
        ({"known": "other"}, "its host key is not the one that is known", "ssh-keygen -R"),
        ({"identity": "other"}, "it refuses the login", "load the key into your agent"),
        ({"remote_python": "/no/python"}, "has no /no/python that would do", "remote_python"),
    ],
)
def test_who_can_not_be_reached_is_told_why(
    laptop: Laptop, tmp_path: Path, fields: dict[str, str], said: str, fix: str
) -> None:
    other = sshd.key(tmp_path / "other")
    config = tmp_path / "config"
    text = laptop.server.config.read_text()
    if "known" in fields:
        known = tmp_path / "known_hosts"
        words = Path(f"{other}.pub").read_text().split()[:2]
        known.write_text(f"[127.0.0.1]:{laptop.server.port} {' '.join(words)}\n" if fields["known"] else "")
        # Whatever the user's own configuration says: an unknown key is never taken.
        text = text.replace(f"{laptop.server.folder}/known_hosts", str(known)) + "  StrictHostKeyChecking no\n"
    if "identity" in fields:
        text = "".join(line for line in text.splitlines(True) if "IdentityFile" not in line)
    config.write_text(text)
    given = {"ssh_config": str(config)}
    given |= {"identity": str(other)} if "identity" in fields else {}
    given |= {name: value for name, value in fields.items() if name == "remote_python"}
    laptop.profile(**given)
    before = laptop.server.log().count("Accepted publickey")
    done = laptop.nemotron("nano3", "data", "prep", "sft", "-c", "tiny", "--batch", "far", code=2)
    assert said in done.stderr and fix in done.stderr and "Traceback" not in done.stderr
    assert not laptop.far.exists()
    assert laptop.runs() == []
    if "remote_python" not in fields:
        assert laptop.server.log().count("Accepted publickey") == before, "refused before anybody logged in"


def test_a_relative_path_is_of_no_machine(laptop: Laptop) -> None:
    done = laptop.nemotron(
        *(
            "nano3",
            "data",
            "prep",
            "sft",
            "-c",
            "tiny",
            "data.sources=[{path: rows.jsonl}]",
            "--dry-run",
            "--run",
            "far",
        ),
        code=2,
    )
    assert "'rows.jsonl' is looked for on cluster" in done.stderr and "full path" in done.stderr
    done = laptop.nemotron("nano3", "sft", "-c", "tiny", "data.path=artifact:none", "--run", "far", code=2)
    assert "no artifact 'none' in the store" in done.stderr and str(laptop.far) in done.stderr
    done = laptop.nemotron("nano3", "data", "prep", "sft", "-c", "tiny", "run.host=else", "--run", "far", code=2)
    assert "run.host" in done.stderr
    assert os.listdir(laptop.folder) == ["env.toml"]


def test_a_reader_over_there_takes_no_submission_back(tmp_path: Path) -> None:
    """What is half submitted from another machine may just be going on: its lock is not seen on the cluster."""
    run = RunDir(tmp_path / "run")
    native = {"jobs": {"first": "1"}, "names": {}, "tokens": {"first": "a", "second": "b"}}
    handle = JobHandle("slurm", "run", str(run.path), {**native, "submitted_from": "elsewhere"})
    write_sealed(run.handle, asdict(handle))
    with pytest.raises(Unreachable, match="being submitted"):
        slurm_handle.recovered(handle)
    assert not (run.path / "second").exists(), "its submission may still begin"


def test_a_folder_that_is_gone_there_empties_no_copy(tmp_path: Path) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    (far / "first").mkdir(parents=True)
    (far / "first" / "log").write_text("begun\n")
    call = Here().call
    replica.refresh(call, str(far), near)
    with open(far / "first" / "log", "a") as log:
        log.write("more\n")
    (far / "first" / "other").write_text("x")
    replica.refresh(call, str(far), near)
    assert (near / "first" / "log").read_text() == "begun\nmore\n"
    (far / "first" / "other").unlink()
    replica.refresh(call, str(far), near)
    assert [path.name for path in (near / "first").iterdir()] == ["log"]
    shutil.rmtree(far)
    with pytest.raises(FileNotFoundError):
        replica.refresh(call, str(far), near)
    assert (near / "first" / "log").read_text() == "begun\nmore\n"
    with pytest.raises(replica.Untrusted):
        replica.refresh(lambda *_: {"files": [["../out", [1, 1, 1, ""], 0, b"x"]], "folders": [], "gone": []}, "", near)
