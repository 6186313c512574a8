"""A store whose file system hangs: a command says so instead of hanging with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nemotron_recipes.cli import attach, reach
from nemotron_recipes.cli.main import only_looks
from nemotron_recipes.errors import UserError
from nemotron_recipes.executors import folders
from tests.helpers.cli import ROOT


def test_a_folder_that_never_answers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reach.check(seconds=60)  # nothing is there yet, and that is an answer
    hangs, real = threading.Event(), os.listdir

    def listdir(folder: Path) -> list[str]:
        if str(folder).endswith("store"):
            hangs.wait()
        return real(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    try:
        with pytest.raises(UserError, match="nemotron-output/store did not answer for 0 s"):
            reach.check(seconds=0.2)
    finally:
        hangs.set()


OTHER = """
import sys, time
until = time.monotonic() + 120
while time.monotonic() < until:
    try:
        if said := open("left").read():
            print(said)
            sys.exit(5)
    except FileNotFoundError:
        pass
    time.sleep(0.01)
"""
GUARDED = """
import os, sys, time
from nemotron_recipes.cli import reach
from nemotron_recipes.executors import folders

OTHER, answers, words = sys.argv[1], os.listdir, sys.argv[2:]
hangs = "hangs" in words
def listdir(folder):
    if hangs and os.getpid() != worker:
        time.sleep(600)
    return answers(folder)
os.listdir = listdir
worker = 0
reach.PAUSE = 0.01
folders.may_fall_silent = lambda folder: "local" not in words
first = os.getpid()
leave = reach._Guard._leave
def left(self):
    leave(self)
    open("left", "w").write(repr(self.folders) + repr(self.looks))
reach._Guard._leave = left
reach.guard(seconds=0.2 if hangs else 60, acts="acts" in words)
worker = os.getpid()
assert (worker == first) == ("local" in words)
if "killed" in words:
    os.kill(first, 9)
    time.sleep(600)
if "becomes" in words:
    os.execvp(sys.executable, [sys.executable, "-c", OTHER])
print("it works", flush=True)
print("beside it", file=sys.stderr, flush=True)
if hangs:
    time.sleep(600)
os.write(1, b"x" * 200_000)
sys.exit(7)
"""


def guarded(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", GUARDED, OTHER, *words]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux lets one wait for a process and for more")
def test_a_folder_that_falls_silent_ends_the_command_that_reads_it(tmp_path: Path) -> None:
    done = guarded(tmp_path, "hangs")
    assert done.returncode == 2 and "nemotron-output/store did not answer for 0 s" in done.stderr


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux lets one wait for a process and for more")
def test_a_guarded_command_ends_as_it_would_alone(tmp_path: Path) -> None:
    done = guarded(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (7, "it works\n" + "x" * 200_000, "beside it\n")


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux lets one wait for a process and for more")
def test_whoever_acts_is_guarded_where_a_folder_is_elsewhere_and_dies_with_its_guard(tmp_path: Path) -> None:
    done = guarded(tmp_path, "hangs", "acts")
    assert done.returncode == 2 and "nemotron-output/store did not answer for 0 s" in done.stderr
    assert "a run that was started goes on" in done.stderr
    for words in (["acts"], ["acts", "local"]):
        done = guarded(tmp_path, *words)
        assert (done.returncode, done.stdout, done.stderr) == (7, "it works\n" + "x" * 200_000, "beside it\n")
    (tmp_path / "left").unlink(missing_ok=True)  # of those that have ended
    done = guarded(tmp_path, "acts", "becomes")  # a shell beside a stage: nobody looks any more
    assert (done.returncode, done.stdout, done.stderr) == (5, "[]{}\n", "")
    done = guarded(tmp_path, "acts", "killed")  # ends: nobody holds the pipes
    assert (done.returncode, done.stdout) == (-9, "")


def test_a_disk_of_this_machine_is_never_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, silent in (("ext4", False), ("overlay", False), ("nfs4", True), ("fuse.sshfs", True), ("lustre", True)):
        monkeypatch.setattr(folders, "_file_system", lambda folder, kind=kind: kind)
        assert folders.may_fall_silent(tmp_path) is silent, kind


def test_who_is_told_to_end_by_several_ends_in_peace() -> None:
    """A guard passes on what its terminal has told the guarded one as well."""
    with attach.stop_signals():
        with pytest.raises(attach.HungUp):
            signal.raise_signal(signal.SIGHUP)
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)


def test_what_only_looks_is_guarded(tmp_path: Path) -> None:
    for line in ("lineage x", "artifacts list --json", "runs show x", "nano3 sft -c tiny --dry-run", "gc"):
        assert only_looks(line.split()), line
    for line in ("nano3 sft -mdc tiny lr=1,2", "nano3 sft -dr spark", "-d nano3 sft", "runs list -n5", "rerun -d x"):
        assert only_looks(line.split()), line
    for line in ("nano3 sft -cd", "nano3 sft -rd", "runs shell x -- ls -d", "runs shell x -- runs list"):
        assert not only_looks(line.split()), line
    for line in ("nano3 sft -c tiny", "runs logs x -f", "runs cancel x", "artifacts sync", "runs watch", "apply f"):
        assert not only_looks(line.split()), line
