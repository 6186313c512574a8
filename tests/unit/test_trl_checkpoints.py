"""Checkpoints are whole or absent, whatever moment a process ends in."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from nemotron_recipes.checkpoints import check
from nemotron_recipes.errors import UserError
from nemotron_recipes.rundir import TRACKER, latest_checkpoint
from nemotron_recipes.worker.trl.checkpoints import (
    checkpoint_to_resume,
    commit_checkpoint,
    quarantine,
    staging_folder,
)

FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors")


def stage(root, step, text="x"):
    folder = staging_folder(root) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(text)


def whole(folder, text):
    return all((folder / name).read_text() == text for name in FILES)


def test_commit_and_keep(tmp_path):
    for step in (5, 10, 15):
        stage(tmp_path, step, str(step))
        commit_checkpoint(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_0000010", "iter_0000015"]
    assert (tmp_path / TRACKER).read_text() == "15\n"
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000015"


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    for text in ("old", "new"):
        stage(tmp_path, 5, text)
        commit_checkpoint(tmp_path, 5, keep=1)
    assert whole(tmp_path / "iter_0000005", "new")


def test_staged_and_untracked_folders_are_never_resumed(tmp_path):
    stage(tmp_path, 5)
    assert checkpoint_to_resume(None, tmp_path, attempt=2) is None
    assert quarantine(tmp_path) == [tmp_path / "partial" / "iter_0000005.unfinished"]
    assert whole(tmp_path / "partial" / "iter_0000005.unfinished", "x")
    assert not staging_folder(tmp_path).exists()
    assert quarantine(tmp_path) == []
    assert checkpoint_to_resume(None, tmp_path, attempt=2) is None


def test_a_checkpoint_that_lost_files_is_moved_away_and_the_one_before_it_resumed(tmp_path):
    for step in (5, 10, 15):
        stage(tmp_path, step, str(step))
        commit_checkpoint(tmp_path, step, keep=3)
    (tmp_path / "iter_0000015" / "optimizer.pt").unlink()
    stage(tmp_path, 20)
    assert checkpoint_to_resume(None, tmp_path, attempt=2) == tmp_path / "iter_0000010"  # a rank that is early
    moved = quarantine(tmp_path)
    assert [path.name for path in moved] == ["iter_0000015.damaged", "iter_0000020.unfinished"]
    assert all(path.is_dir() for path in moved)
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000010", "for whoever asks the tracker"
    assert checkpoint_to_resume(None, tmp_path, attempt=2) == tmp_path / "iter_0000010"
    stage(tmp_path, 15)
    assert [path.name for path in quarantine(tmp_path)] == ["iter_0000015.unfinished"]
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["iter_0000015.unfinished"], (
        "they do not pile up"
    )


def test_when_every_own_checkpoint_is_damaged_training_does_not_start_anew(tmp_path):
    stage(tmp_path, 5)
    (commit_checkpoint(tmp_path, 5, keep=1) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="the weights missing"):
        checkpoint_to_resume(None, tmp_path, attempt=2)
    quarantine(tmp_path)
    with pytest.raises(UserError, match="partial"):
        checkpoint_to_resume(None, tmp_path, attempt=2)


def test_what_is_resumed(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    for root, step in ((own, 5), (other, 7)):
        stage(root, step)
        commit_checkpoint(root, step, keep=1)
    assert checkpoint_to_resume(str(other), own, attempt=1) == other / "iter_0000007"  # a root, by its tracker
    assert checkpoint_to_resume(str(other / "iter_0000007"), own, attempt=1) == other / "iter_0000007"
    assert checkpoint_to_resume(str(other), own, attempt=2) == own / "iter_0000005"
    assert checkpoint_to_resume(None, own, attempt=1) is None


def test_a_later_attempt_never_starts_anew_when_its_checkpoint_is_gone(tmp_path):
    stage(tmp_path, 5)
    commit_checkpoint(tmp_path, 5, keep=1).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is missing"):
        checkpoint_to_resume(None, tmp_path, attempt=2)


@pytest.mark.parametrize("damage", ["missing", "tracker", "part", "weights", "empty"])
def test_what_cannot_be_resumed_is_fatal(tmp_path, damage):
    stage(tmp_path, 5)
    folder = commit_checkpoint(tmp_path, 5, keep=1)
    given = tmp_path if damage == "tracker" else folder
    if damage == "missing":
        given = tmp_path / "iter_0000006"
    elif damage == "tracker":
        folder.rename(tmp_path / "elsewhere")
    elif damage == "empty":
        given = tmp_path / "nothing"
        given.mkdir()
    else:
        (folder / ("optimizer.pt" if damage == "part" else "model.safetensors")).unlink()
    with pytest.raises(UserError):
        checkpoint_to_resume(str(given), tmp_path / "own", attempt=1)


@pytest.mark.parametrize("name", [*FILES, "digests.json"])
def test_a_changed_byte_is_noticed_before_anything_is_loaded(tmp_path, name):
    stage(tmp_path, 5, "whole")
    folder = commit_checkpoint(tmp_path, 5, keep=1)
    check(folder)
    whole = (folder / name).read_bytes()
    for damaged in (whole[:2] + b"?" + whole[3:], whole[:-2]):
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            check(folder)
    (folder / name).write_bytes(whole)
    check(folder)
    (folder / "digests.json").unlink()
    check(folder)  # of an earlier version, or somebody else's


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import nemotron_recipes.fsio as fsio
    from nemotron_recipes.worker.trl import checkpoints
    root, moment = Path(sys.argv[1]), int(sys.argv[2])
    calls = 0
    def counted(real):
        def call(*arguments, **options):
            global calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    for name in ("rename", "replace", "fsync", "unlink", "rmdir", "open"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoints.commit_checkpoint(root, 10, keep=1)
    os.write(1, b"done")
"""


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    """SIGKILL before every rename, fsync, unlink and open of a commit in turn."""
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    moment, ended = 0, False
    outcomes = set()
    while not ended:
        moment += 1
        root = tmp_path / str(moment)
        stage(root, 5, "5")
        commit_checkpoint(root, 5, keep=1)
        stage(root, 10, "10")
        done = subprocess.run([sys.executable, script, root, str(moment)], capture_output=True, env=os.environ)
        ended = done.stdout == b"done"
        assert ended or done.returncode == -signal.SIGKILL, done.stderr
        newest = checkpoint_to_resume(None, root, attempt=2)
        assert newest is not None
        assert whole(newest, str(int(newest.name[5:])))
        outcomes.add(newest.name)
        quarantine(root)
        assert checkpoint_to_resume(None, root, attempt=2) == newest
        assert not list(root.glob("*.removing"))
    assert outcomes == {"iter_0000005", "iter_0000010"} and moment > 10
