"""One process tells W&B of a run: on whatever host, also where file locks don't reach, and after any end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.owner import this_process
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.mirror import lease, pull
from nemotron_recipes.mirror.lease import STALE_SECONDS, Lease
from nemotron_recipes.mirror.scratch import OWNER, PREFIX, scratch, sweep
from nemotron_recipes.mirror.sync import BUSY
from nemotron_recipes.spec import Artifact, Tree
from tests.helpers.mirrored import a_run

ELSEWHERE = {"host": "another", "pid": 1, "start": "1", "boot": "another boot", "namespace": "pid:[1]"}


def held(folder: Path, owner: dict[str, object], age: float = 0.0, number: int = 1) -> Path:
    path = folder / f"lease-{number}"
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_another_hosts_lease_holds_until_it_is_no_longer_touched(tmp_path: Path) -> None:
    path = held(tmp_path, ELSEWHERE, age=STALE_SECONDS - 60)
    assert not Lease(tmp_path).take(0.0)
    held(tmp_path, ELSEWHERE, age=STALE_SECONDS + 60)
    mine = Lease(tmp_path)
    assert mine.take(0.0) and mine.number == 2 and not path.exists()
    assert not Lease(tmp_path).take(0.0), "this process lives"
    mine.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[1]", '{"host": "x"'])
def test_a_lease_cut_off_while_it_was_written_is_over_in_time(tmp_path: Path, text: str) -> None:
    (tmp_path / "lease-1").write_text(text)
    assert not Lease(tmp_path).take(0.0)
    os.utime(tmp_path / "lease-1", (1, 1))
    assert Lease(tmp_path).take(0.0)


def test_a_killed_process_holds_nothing_and_its_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = {**this_process(), "start": "1"}  # that PID is another process now
    owners = {"killed": gone, "lives": this_process(), "elsewhere": ELSEWHERE}
    folders = {name: tmp_path / f"{PREFIX}{name}" for name in (*owners, "begins", "half gone")}
    for folder in folders.values():
        folder.mkdir()
    for name, owner in owners.items():
        (folders[name] / OWNER).write_text(json.dumps(owner))
    os.utime(folders["half gone"], (1, 1))
    held(tmp_path, gone)
    mine = Lease(tmp_path)
    assert mine.take(0.0)
    mine.release()
    with scratch() as own:
        assert [name for name, folder in folders.items() if folder.exists()] == ["lives", "elsewhere", "begins"]
        sweep()
        assert Path(own).exists()
    assert not Path(own).exists()


def test_who_nobody_watches_ends_and_holds_nothing(tmp_path: Path) -> None:
    """Its starter had ended before it could ask who that was."""
    journal = a_run(tmp_path)
    argv = [sys.executable, "-m", "nemotron_recipes.mirror.replay", str(journal.run_dir), "--watcher", "0"]
    environ = {**os.environ, "TMPDIR": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "k" * 40}
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (BUSY, "who started this process has ended\n")
    mine = Lease(journal.folder)
    assert mine.take(0.0) and mine.number == 2


def test_who_was_taken_over_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    lost = threading.Event()
    mine = Lease(tmp_path)
    assert mine.take(0.0)
    mine.keep(lost.set)
    before = (tmp_path / "lease-1").stat().st_mtime_ns
    until = time.monotonic() + 120
    while (tmp_path / "lease-1").stat().st_mtime_ns == before and time.monotonic() < until:
        time.sleep(0.01)
    assert (tmp_path / "lease-1").stat().st_mtime_ns > before and not lost.is_set()
    held(tmp_path, ELSEWHERE, number=2)
    assert lost.wait(120)


def test_of_many_at_once_one_has_it(tmp_path: Path) -> None:
    """Each notes when it came and went; no two were there at a time."""
    line = """
import sys, time
from pathlib import Path
from nemotron_recipes.mirror.lease import Lease
folder = Path(sys.argv[1])
for n in range(5):
    mine = Lease(folder / "mirror")
    assert mine.take(300)
    with open(folder / "log", "a") as log:
        print("in", file=log, flush=True)
        time.sleep(0.002)
        print("out", file=log, flush=True)
    mine.release()
"""
    (tmp_path / "mirror").mkdir()
    several = [subprocess.Popen([sys.executable, "-c", line, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(timeout=400) for process in several] == [0] * 4
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 20
    assert list((tmp_path / "mirror").iterdir()) == []


def test_of_two_runs_that_want_it_one_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = Artifact("wandb", "data", "team/p/rows", revision="v0", digest="d")
    asked, waits, really = [], threading.Event(), Lease._try

    def fake_ask(arguments: list[str], seconds: float) -> Tree:
        asked.append(arguments)
        assert waits.wait(300), "the other one does not wait"
        (Path(arguments[2]) / "x").write_text("rows")
        return {"version": "v0", "digest": "d", "type": "dataset", "recorded": None}

    def trying(self: Lease) -> bool:
        return really(self) or waits.set() is not None

    monkeypatch.setattr(pull, "_ask", fake_ask)
    monkeypatch.setattr(Lease, "_try", trying)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.02)
    found: list[Artifact] = []

    def run() -> None:
        found.append(pull.ensure(Store(tmp_path), pinned, download=True))

    several = [threading.Thread(target=run) for _ in range(2)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join(400)
    assert len(asked) == 1 and len(found) == 2 and found[0] == found[1] and found[0].version == 1
