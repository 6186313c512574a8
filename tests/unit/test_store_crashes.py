"""Many writers at once, and writers that die at any moment: acknowledged versions are whole, others whole or absent."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron_recipes.artifacts import staging
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.spec import Producer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def register(store: Store, text: str, producer: Producer | None) -> int:
    staged = store.stage("rows")
    (staged.content / "deep").mkdir()
    (staged.content / "deep" / "a.txt").write_text(text)
    (staged.content / "b.txt").write_text(text * 100)
    return store.commit(staged, kind="data", producer=producer).version or 0


def fork(work: Callable[[int], None]) -> tuple[int, int]:
    """Run `work(descriptor to report to)` in a child; (pid, descriptor to read from)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        os.close(reader)
        work(writer)
        code = 0
    finally:
        os._exit(code)


def result(child: tuple[int, int]) -> tuple[int, list[str]]:
    """(exit status, lines reported) of a child that has ended."""
    pid, reader = child
    with os.fdopen(reader) as pipe:
        lines = pipe.read().split()
    return os.waitpid(pid, 0)[1], lines


@pytest.mark.parametrize("processes", [8, pytest.param(32, marks=pytest.mark.long)])
def test_processes_at_once_get_distinct_whole_versions(tmp_path: Path, processes: int) -> None:
    store = Store(tmp_path)

    def work(number: int) -> Callable[[int], None]:
        def run(report: int) -> None:
            for turn in range(3):
                version = register(store, f"{number}.{turn}", Producer(f"f{number}", "r", "s", "data"))
                os.write(report, f"{version}={number}.{turn}\n".encode())

        return run

    outcomes = [result(child) for child in [fork(work(number)) for number in range(processes)]]
    assert [status for status, _ in outcomes] == [0] * processes
    said = dict(line.split("=") for _, lines in outcomes for line in lines)
    assert sorted(map(int, said)) == list(range(1, 3 * processes + 1)) == store.versions("rows")
    for version, text in said.items():
        artifact = store.resolve(f"rows:v{version}")
        store.verify(artifact)
        assert (store.content(artifact) / "deep" / "a.txt").read_text() == text
        assert store.describe(artifact)["version"] == int(version)
    for number in range(processes):
        found = store.find(f"f{number}", "data", "rows")
        assert found and found.version == max(int(v) for v, text in said.items() if text.startswith(f"{number}."))
    assert list((tmp_path / ".staging").iterdir()) == []


def die_at(step: int) -> None:
    """From now on SIGKILL this process just before its `step`-th change of the file system."""
    left = step

    def count(event: str, *_: object) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.fsync"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    # A process that dies loses nothing that the kernel has: the disk, which is slow, is for the power cuts.
    os.fsync = lambda descriptor: (count("os.fsync"), os.fstat(descriptor))[1]  # type: ignore[assignment,func-returns-value]
    sys.addaudithook(lambda event, args: count(event))


def test_killed_at_every_step_of_a_commit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in range(1, 500):
        before = store.versions("rows")
        producer = Producer(f"f{step}", "r", "s", "data")

        def work(report: int, step: int = step, producer: Producer = producer) -> None:
            die_at(step)
            os.write(report, f"{register(store, 'new', producer)}\n".encode())

        status, lines = result(fork(work))
        added = store.versions("rows")[len(before) :]
        assert added in ([], [len(before) + 1]), f"step {step}"
        for version in added:
            store.verify(store.resolve(f"rows:v{version}"))
        found = store.find_output(producer)
        assert [found.version if found else None] == (added or [None]), f"step {step}: the index knows something else"
        if lines:
            assert lines == [str(version) for version in added], f"step {step}: acknowledged, but not there"
        staging.clean(tmp_path, time.time())
        for left in (tmp_path / ".staging").glob("*"):  # it died before it could say who it is: that goes by age
            assert not (left / "owner.json").exists() and not (left / "version").exists(), f"step {step}: {left} stays"
            shutil.rmtree(left)  # else the next child spends its next step on looking at it, and so on for ever
        if not os.WIFSIGNALED(status):
            assert status == 0 and lines
            assert step > 30, "the harness has to reach into the commit"
            return
    raise AssertionError("no commit came to its end")


@pytest.mark.parametrize("producer", [Producer("f", "r", "s", "data"), None])
def test_everything_is_durable_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, producer: Producer | None
) -> None:
    """A power cut loses what was not fsynced: files before the rename, the folder that names the version after it."""
    store = Store(tmp_path)
    trace: list[tuple[str, int]] = []  # (what, inode)
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (trace.append(("fsync", os.fstat(fd).st_ino)), real_fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (trace.append(("rename", os.stat(a).st_ino)), real_rename(a, b))[1])
    register(store, "x", producer)
    home = tmp_path / "rows"
    version = home / "v1"
    moved = trace.index(("rename", version.stat().st_ino))
    before = {inode for what, inode in trace[:moved] if what == "fsync"}
    after = {inode for what, inode in trace[moved:] if what == "fsync"}
    index = tmp_path / ".index"
    for path in [version, *version.rglob("*"), tmp_path, *([index, *index.glob("*")] if producer else [])]:
        assert path.stat().st_ino in before, f"{path} isn't durable when the version appears"
    assert home.stat().st_ino in after, "the version's name isn't durable when it is acknowledged"
