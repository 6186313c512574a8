"""A failure at every write-class system call of a commit, by strace: the acknowledged is whole, the rest or absent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_recipes import checkpoints, closing
from nemotron_recipes.artifacts import contents
from nemotron_recipes.artifacts.stages import read_events
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.rundir import RunDir, StageDir, latest_checkpoint, read_json

ROOT = Path(__file__).parents[2]
CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "chmod")
FAULTS = {"kill": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC", "short": "retval=1"}
pytestmark = [pytest.mark.long, pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")]


@pytest.mark.parametrize(
    ("call", "fault"), [(call, fault) for call in CALLS for fault in FAULTS if call == "write" or fault != "short"]
)
def test_every_call_of_a_commit(tmp_path: Path, call: str, fault: str) -> None:
    acknowledged: list[str] = []
    theirs = tmp_path / "other" / "iter_0000001"
    theirs.mkdir(parents=True)
    (theirs / "common.pt").write_text("of a trainer")
    for turn in range(1, 300):
        trace = tmp_path / "trace"
        inject = f"inject={call}:{FAULTS[fault]}:when={turn}"
        command = ["strace", "-o", str(trace), "-e", f"trace={call}", "-e", inject]
        done = subprocess.run(
            [*command, sys.executable, "-B", "-m", "tests.helpers.commit_once", str(tmp_path), str(turn)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        said = done.stdout.splitlines() if done.returncode == 0 else []
        check(tmp_path, said, acknowledged)
        hit = "INJECTED" in trace.read_text() or "killed by SIGKILL" in trace.read_text()
        if not hit:
            assert said and turn > 1, (call, done.stderr)
            return
    raise AssertionError("it never came to its end")


def check(folder: Path, said: list[str], acknowledged: list[str]) -> None:
    store = Store(folder / "store")
    versions = store.versions("rows")
    assert versions == list(range(1, len(versions) + 1))
    for version in versions:
        store.verify(made := store.resolve(f"rows:v{version}"))
        assert (store.content(made).parent / contents.FILES).is_file()
    record = read_json(StageDir(folder / "stage").record)
    acknowledged += [line.removeprefix("journal ") for line in said if line.startswith("journal ")]
    for line in said:
        what, _, rest = line.partition(" ")
        if what == "version":
            assert int(rest) in versions
        if what == "record":
            assert record == {"attempt": int(rest), "files": {}}
        if what == "checkpoint":
            assert latest_checkpoint(folder / "own") == folder / "own" / f"iter_{int(rest):07d}"
        if what == "end":
            assert read_events(RunDir(folder).events)[-1]["turn"] == int(rest)
    newest = latest_checkpoint(folder / "own")
    assert newest is None or checkpoints.check(newest) is not None
    assert list(checkpoints.changed(folder / "other")) == list(closing.changed(RunDir(folder))) == []
    keys = [entry["key"] for entry in Journal(folder).entries()]
    assert set(acknowledged) <= set(keys)
