"""The copy here of a run's folder there: whole files, no checkpoints. With a real sshd: tests/slurm/test_ssh.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.executors.remote import replica, there, there_changes
from nemotron_recipes.executors.remote.transport import Here
from nemotron_recipes.rundir import TRACKER, latest_checkpoint


class Copy:
    """Two folders, and what was sent from one to the other."""

    def __init__(self, folder: Path):
        self.far, self.near = folder / "far" / "run", folder / "near" / "run"
        self.sent: list[tuple[str, int, int]] = []  # name, offset, bytes
        self.before: Callable[[], None] = lambda: None  # each question

    def refresh(self) -> list[tuple[str, int, int]]:
        self.sent = []
        replica.refresh(self._call, str(self.far), self.near)
        return self.sent

    def _call(self, function: Any, *args: Any) -> Any:
        self.before()
        said = Here().call(function, *args)
        self.sent += [(name, offset, len(data)) for name, _, offset, data in said["files"]]
        return said

    def write(self, name: str, text: str) -> None:
        """In place: the inode stays, as where a file system gives it to the file that replaces another."""
        path = self.far / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def read(self, name: str) -> str:
        return (self.near / name).read_text()


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_checkpoints_stay_there_however_a_backend_names_them(copy: Copy) -> None:
    root = "sft/checkpoints"
    for folder in ("epoch_0_step_10", "step_20", ".staging/checkpoint-30", "iter_0000040", "partial/iter_0000005"):
        copy.write(f"{root}/{folder}/model/weights.safetensors", "x" * 100)
    checkpoints = copy.far / root
    (checkpoints / "iter_0000010").symlink_to("epoch_0_step_10")
    (checkpoints / "iter_0000020").symlink_to("step_20")
    (checkpoints / "iter_0000099").symlink_to("gone")
    (checkpoints / "LATEST").symlink_to("epoch_0_step_10")
    for step in (10, 20, 40):
        copy.write(f"{root}/{TRACKER}", f"{step}\n")
        sent = copy.refresh()
        assert [name for name, _, _ in sent] == [f"{root}/{TRACKER}"]
        assert latest_checkpoint(copy.near / root) == copy.near / root / f"iter_{step:07d}"
    assert {path.name for path in (copy.near / root).iterdir()} == {
        *("epoch_0_step_10", "step_20", ".staging", "partial", "iter_0000010", "iter_0000020", "iter_0000040", TRACKER)
    }
    assert [path.name for path in (copy.near / root).rglob("*") if path.is_file()] == [TRACKER]


def test_a_copy_that_an_older_version_made_loses_its_checkpoints(copy: Copy) -> None:
    name = "sft/checkpoints/step_20/weights"
    copy.write(name, "x" * 100)
    (copy.near / name).parent.mkdir(parents=True)
    (copy.near / name).write_text("x" * 100)
    (copy.near / ".copied.json").write_text(json.dumps({"files": {name: [1, 100, 5]}, "time": 1.0}))
    copy.refresh()
    assert not (copy.near / name).exists()


def test_a_file_that_was_replaced_under_the_same_inode_comes_anew(copy: Copy) -> None:
    for name in ("sft/heartbeats/attempt-1.rank-0.json", "sft/stacks/attempt-1.rank-0.txt", "sft/logs/rank-0.log"):
        copy.write(name, "first\n")
        copy.refresh()
        copy.write(name, "second, and longer\n")
        assert copy.refresh() == [(name, 0, 19)]
        assert copy.read(name) == "second, and longer\n"


def test_of_a_log_that_has_grown_the_rest_comes(copy: Copy) -> None:
    for name in ("events.jsonl", "sft/logs/rank-0.log", "sft/logs/nodes-1.out", "sft/submission/1.err"):
        begun = "line\n" * there_changes.TAIL
        copy.write(name, begun)
        copy.refresh()
        copy.write(name, begun + "more\n")
        assert copy.refresh() == [(name, len(begun), 5)]
        assert copy.read(name) == begun + "more\n"
        assert copy.refresh() == []


def test_what_is_gone_here_comes_again(copy: Copy) -> None:
    copy.write("driver.log", "begun\n")
    copy.refresh()
    (copy.near / "driver.log").unlink()
    assert copy.refresh() == [("driver.log", 0, 6)]
    (copy.near / "driver.log").write_text("beg")
    copy.write("driver.log", "begun\nmore\n")
    assert copy.refresh() == [("driver.log", 0, 11)]
    assert copy.read("driver.log") == "begun\nmore\n"


def test_a_large_file_comes_in_pieces(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(there, "PIECE", 10)
    for name in ("rendered.json", "driver.log"):
        copy.write(name, "".join(chr(ord("a") + number) for number in range(25)))
        assert copy.refresh() == [(name, 0, 10), (name, 10, 10), (name, 20, 5)]
        assert copy.read(name) == (copy.far / name).read_text()


def test_a_large_file_that_never_stands_still_is_left_for_the_next_time(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(there, "PIECE", 10)
    numbers = iter(range(100))
    copy.before = lambda: copy.write("stacks.txt", f"{next(numbers):02d}" * 20)
    assert len(copy.refresh()) == 2
    copy.before = lambda: None
    copy.refresh()
    assert copy.read("stacks.txt") == "01" * 20
