"""A cluster behind a real sshd: the same commands from a machine that has neither Slurm nor the cluster's folders."""

from __future__ import annotations

import contextlib
import io
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

from nemotron_recipes.cli import main
from nemotron_recipes.executors.remote import replica, ssh
from nemotron_recipes.executors.remote.transport import Here, Unreachable
from nemotron_recipes.executors.slurm import control, handles
from nemotron_recipes.rundir import RunDir, read_json, read_jsonl, write_sealed
from nemotron_recipes.spec import JobHandle
from tests.helpers import slurm, sshd
from tests.helpers.data_prep import bytes_of, chat, write_rows
from tests.helpers.leaks import leaks
from tests.helpers.plans import ROOT
from tests.helpers.small_disk import small_disk

PREP = ("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "40")

pytestmark = [pytest.mark.slurm, pytest.mark.e2e]


@pytest.fixture(scope="module")
def server(slurm_cluster: slurm.Cluster) -> Iterator[sshd.Server]:
    """An sshd in front of the session's cluster."""
    sshd.require()
    sessions = {"SLURM_CONF": slurm_cluster.env["SLURM_CONF"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with sshd.server(sessions) as found:
        yield found


@pytest.fixture
def laptop(server: sshd.Server, tmp_path: Path) -> Iterator[Laptop]:
    control._silent.clear()
    yield Laptop(server, tmp_path)
    for connection in ssh._connections.values():
        connection.close()


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

    def typed(self, monkeypatch: pytest.MonkeyPatch, *argv: str, code: int = 0) -> tuple[str, str]:
        """The same in this process, which has imported everything: stdout and stderr."""
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as here, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            for name in os.environ.keys() - self.env.keys():
                here.delenv(name)
            for name, value in self.env.items():
                here.setenv(name, value)
            here.chdir(self.folder)
            with pytest.raises(SystemExit) as ended:
                main.main(list(argv))
        assert ended.value.code == code, f"{argv}\n{out.getvalue()}\n{err.getvalue()}\n{self.server.log()}"
        return out.getvalue(), err.getvalue()

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


def explains_itself(*copies: RunDir) -> None:
    """The machine that ran it and the one that sent it say the same of its code, its patch and what it ran on."""
    for run in copies:
        plan, (facts,) = read_json(run.plan) or {}, [*run.path.glob("*/environment/attempt-1.json")]
        environment = read_json(facts) or {}
        assert environment["host"] and environment["cpus"] and "numpy" in environment["packages"]
        assert (run.path / "code.patch").is_file() == bool(plan["code"]["git_diff_digest"])
    texts = [[path.read_bytes() for path in sorted(run.path.glob("code.patch"))] for run in copies]
    assert texts[0] == texts[-1]


def test_the_same_commands_from_a_laptop(laptop: Laptop) -> None:
    laptop.env["LICENCE_TOKEN"] = 't0ken/of+the "laptop"&its-owner'
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
    explains_itself(there, here)
    assert leaks(laptop.env["LICENCE_TOKEN"], [laptop.far, laptop.folder]) == []
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


@pytest.mark.long
def test_an_array_from_a_laptop(laptop: Laptop, tmp_path: Path) -> None:
    """The shards are there, and so are the tasks; what they made is what one machine makes."""
    (tmp_path / "rows").mkdir()
    for number in range(4):
        write_rows(tmp_path / "rows" / f"{number}.jsonl", [chat(f"What is {n}?", f"It is {n}.") for n in range(9)])
    words = ("nano3", "data", "prep", "sft", "-c", "tiny", f"data.sources=[{{path: {tmp_path / 'rows'}}}]")
    begun = json.loads(laptop.nemotron(*words, "run.data_array=2", "--batch", "far", "--json").stdout)
    assert sorted(begun["native"]["jobs"]) == ["data-prep-sft", "data-prep-sft.array"]
    assert "succeeded" in laptop.nemotron("runs", "logs", "-f", begun["run"]).stdout
    assert laptop.runs()[0]["state"] == "succeeded"
    assert "data-prep-sft" in laptop.nemotron("runs", "show", begun["run"]).stdout
    logs = [path.read_text() for path in (laptop.far / "runs").rglob("nodes-*_[01].out")]
    assert len(logs) == 2 and all("2 of 4 shards are done" in text for text in logs)
    laptop.nemotron(*words)
    places = (laptop.far, laptop.folder)
    (far,), (here,) = ([*place.rglob("content/metadata.json")] for place in places)
    assert bytes_of(far.parent) == bytes_of(here.parent)


def test_one_connection_serves_all_commands(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    laptop.nemotron("doctor", "far", code=0)
    before = laptop.server.accepted
    shown, _ = laptop.typed(monkeypatch, "doctor", "far")
    assert laptop.server.accepted == before, "the connection of the command before is used again"
    assert "remote_job_dir on cluster writable" in shown and "partition" in shown
    folder = laptop.server.home / ".nemotron" / "ssh"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_who_can_not_be_reached_is_told_why_and_nothing_has_happened(
    laptop: Laptop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that can be wrong with a connection: tests/unit/test_ssh_connections.py."""
    (tmp_path / "known_hosts").touch()
    text = laptop.server.config.read_text()
    config = tmp_path / "config"
    config.write_text(text.replace(f"{laptop.server.folder}/known_hosts", str(tmp_path / "known_hosts")))
    laptop.profile(ssh_config=str(config))
    _, said = laptop.typed(monkeypatch, *PREP, "--batch", "far", code=2)
    assert "its host key is not known" in said and "compare the key's fingerprint" in said
    assert not laptop.far.exists()
    assert os.listdir(laptop.folder) == ["env.toml"]


def test_a_sweep_from_a_laptop(laptop: Laptop, slurm_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other with nobody alive, continued and cancelled by its name."""
    flags = ("--multirun", "--max-parallel", "1", "run.additional_parameters={hold: true}", "--batch", "far", "--json")
    words = (*PREP, "data.pack_size=128,256", *flags)
    told = json.loads(laptop.typed(monkeypatch, *words)[0])
    runs = [RunDir(laptop.folder / "nemotron-output/runs" / entry["run"]) for entry in told["runs"]]
    first, second = ((read_json(run.handle) or {})["native"]["jobs"]["data-prep-sft"] for run in runs)
    assert slurm_cluster.job(second)["Dependency"] == f"afterany:{first}(unfulfilled)"
    assert all((laptop.far / "runs" / run.path.name / "plan.json").exists() for run in runs)
    again = json.loads(laptop.typed(monkeypatch, *words)[0])
    assert again == told, "the same sweep: nothing is submitted twice"
    cancelled, _ = laptop.typed(monkeypatch, "runs", "cancel", told["sweep"])
    assert all(f"{run.path.name}: cancelled" in cancelled for run in runs)
    for job in (first, second):
        assert slurm_cluster.wait(job)["JobState"] == "CANCELLED"


def test_a_login_node_without_slurm(laptop: Laptop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the cluster is asked first or not: sbatch is missing, that is said, and nothing is half done."""
    (tmp_path / "nothing").mkdir()
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPATH={tmp_path}/nothing\nexport PATH\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    laptop.profile(remote_python=str(program))
    _, said = laptop.typed(monkeypatch, *PREP, "--batch", "far", code=2)
    assert "is not on the PATH of cluster" in said and not laptop.far.exists()
    _, said = laptop.typed(monkeypatch, *PREP, "--batch", "far", "--skip-preflight", code=2)
    assert "sbatch is not on the PATH of cluster" in said
    (run,) = json.loads(laptop.typed(monkeypatch, "runs", "list", "--json")[0])
    assert run["state"] == "cancelled"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for next to nothing."""
    with small_disk(tmp_path / "small", "64k") as folder:
        yield folder


def test_folders_there_that_can_not_be_used(laptop: Laptop, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = (*PREP, "--batch", "far")
    laptop.profile(remote_job_dir=str(disk))
    _, said = laptop.typed(monkeypatch, *submit, "--skip-preflight", code=2)  # it fills up while the run goes there
    assert "No space left on device" in said and "remote_job_dir" in said
    (disk / "rest").write_bytes(b"x" * (shutil.disk_usage(disk).free))
    _, said = laptop.typed(monkeypatch, *submit, code=2)
    assert f"no room is left below {disk}" in said and "remote_job_dir" in said
    laptop.profile(remote_job_dir="/proc/nemotron")
    _, said = laptop.typed(monkeypatch, *submit, "--skip-preflight", code=2)
    assert "/proc/nemotron" in said
    laptop.profile(remote_job_dir="runs")
    _, said = laptop.typed(monkeypatch, *submit, code=2)
    assert "'runs' is no full path" in said
    views = json.loads(laptop.typed(monkeypatch, "runs", "list", "--json")[0])
    assert [view["state"] for view in views] == ["cancelled"] * 2


@pytest.mark.long
def test_a_pipe_from_a_laptop_goes_on_after_a_failure(laptop: Laptop, tmp_path: Path) -> None:
    """And what one looks at then: each command that reads runs and artifacts, over the connection."""
    pipe = laptop.folder / "conf" / "recipe" / "nano3" / "pipe" / "two.yaml"
    pipe.parent.mkdir(parents=True)
    stages = "  - {stage: data prep sft, config: tiny}\n  - {stage: sft, config: tiny}\n"
    pipe.write_text(f"# @package _global_\nkind: pipe\nstages:\n{stages}")
    mended = tmp_path / "mended"
    with open(laptop.folder / "env.toml", "a") as profile:
        profile.write(f"setup = ['case $SLURM_JOB_NAME in *.sft) test -e {mended};; esac']\n")
    short = ("sft.train.train_iters=4", "sft.checkpoint.save_interval=2", "sft.evaluation.rows=4")
    words = ("nano3", "pipe", "-c", "two", *short)
    done = laptop.nemotron(*words, "--batch", "far", "--wait", code=1)
    failed = laptop.runs()[0]
    states = {stage["name"]: stage["state"] for stage in failed["stages"]}
    assert failed["state"] == "failed" and states["data-prep-sft"] == "succeeded", done.stdout
    assert "failed" in laptop.nemotron("runs", "explain", failed["id"]).stdout
    mended.touch()
    laptop.nemotron(*words, "--run", "far")
    run = laptop.runs()[0]
    assert run["id"] != failed["id"] and run["state"] == "succeeded"
    assert {stage["name"]: stage["state"] for stage in run["stages"]}["data-prep-sft"] == "reused"
    rerun = json.loads(laptop.nemotron("rerun", run["id"], "--json").stdout)  # followed, as that run was
    assert rerun["state"] == "succeeded" and rerun["id"] != run["id"]
    # Looking at all of it.
    for argv, said in (
        (("runs", "show", run["id"]), "succeeded"),
        (("runs", "logs", run["id"], "--all-ranks"), "step 4/4"),
        (("runs", "watch", run["id"]), f"{run['id']}: succeeded"),
        (("runs", "diff", failed["id"], run["id"]), "inputs"),
        (("runs", "compare", failed["id"], run["id"]), "TOKENS/S"),
        (("artifacts", "list", "-p", "far"), "nano3-tiny-sft-data:v1"),
        (("artifacts", "show", "nano3-tiny-sft", "--verify", "-p", "far"), f"{laptop.far}/store/nano3-tiny-sft/v"),
        (("lineage", "nano3-tiny-sft:v1", "-p", "far"), "data.path: nano3-tiny-sft-data:v1"),
    ):
        assert said in laptop.nemotron(*argv).stdout, argv
    laptop.nemotron("report", "nano3-tiny-sft:v1", "-p", "far")
    assert "nano3-tiny-sft-data:v1" in (laptop.folder / "report.md").read_text()
    assert "no artifact 'none'" in laptop.nemotron("lineage", "none", "-p", "far", code=2).stderr
    # What the same stage has taken there says how long it takes.
    again = [word.removeprefix("sft.") for word in short]
    sft = ("nano3", "sft", "-c", "tiny", "data.path=artifact:nano3-tiny-sft-data", *again)
    assert f"(from run {rerun['id']})" in laptop.nemotron(*sft, "--dry-run", "--batch", "far").stdout


def test_a_relative_path_is_of_no_machine(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("nano3", "data", "prep", "sft", "-c", "tiny")
    told = laptop.typed(monkeypatch, *words, "data.sources=[{path: rows.jsonl}]", "--dry-run", "--run", "far", code=2)
    assert "'rows.jsonl' is looked for on cluster" in told[1] and "full path" in told[1]
    told = laptop.typed(monkeypatch, "nano3", "sft", "-c", "tiny", "data.path=artifact:none", "--run", "far", code=2)
    assert "no artifact 'none' in the store" in told[1] and str(laptop.far) in told[1]
    told = laptop.typed(monkeypatch, *words, "run.host=else", "--run", "far", code=2)
    assert "run.host" in told[1]
    assert os.listdir(laptop.folder) == ["env.toml"]


def test_a_reader_over_there_takes_no_submission_back(tmp_path: Path) -> None:
    """What is half submitted from another machine may just be going on: its lock is not seen on the cluster."""
    run = RunDir(tmp_path / "run")
    native = {"jobs": {"first": "1"}, "names": {}, "tokens": {"first": "a", "second": "b"}}
    handle = JobHandle("slurm", "run", str(run.path), {**native, "submitted_from": "elsewhere"})
    write_sealed(run.handle, asdict(handle))
    with pytest.raises(Unreachable, match="being submitted"):
        handles.recovered(handle)
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
