"""Copies on other hosts over a real sshd on loopback: given up in the middle, and cleared after a killed driver."""

from __future__ import annotations

import fcntl
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.errors import JobFailed
from nemotron_recipes.executors.docker import settle
from nemotron_recipes.executors.driver import Driver, StageFailed, Started
from nemotron_recipes.executors.hosts import copies
from nemotron_recipes.executors.hosts.network import Host
from nemotron_recipes.executors.remote.ssh import Remote, connection
from nemotron_recipes.executors.remote.ssh_login import Login
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import RunDir, read_jsonl
from nemotron_recipes.spec import JobHandle, RenderedStage
from tests.helpers import sshd


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Login]:
    sshd.require()
    with sshd.server({}) as server:
        monkeypatch.setenv("HOME", str(server.home))
        found = Login("cluster", config=str(server.config), python=sys.executable)
        yield found
        connection(found).close()


def test_a_copy_is_given_up_in_the_middle_of_a_file_and_made_whole_later(login: Login, tmp_path: Path) -> None:
    large = tmp_path / "model.safetensors"
    with open(large, "wb") as file:
        file.truncate(copies.READ_WHOLE + (8 << 20))
    host = Host("cluster", 1, Remote(connection(login)), str(tmp_path / "far"))
    asked = 0

    def unwanted() -> bool:
        nonlocal asked
        asked += 1
        return asked > 100

    with pytest.raises(copies.Abandoned):
        copies.send(host, [large], unwanted)
    assert asked == 101 or asked == 102, "nothing more is sent"
    copy = Path(host.place(str(large)))
    assert not copy.exists() or copy.stat().st_size < large.stat().st_size
    assert copies.send(host, [large]) == large.stat().st_size == copy.stat().st_size
    assert copies.send(host, [large]) == 0, "it is there"


def test_a_disk_that_is_full_is_said_in_a_line_however_many_there_are(
    login: Login, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tar has a line for each of many files, more than pipes hold, while it is still being fed. tar is faked."""
    large, said = tmp_path / "rows.jsonl", tmp_path / "said"
    with open(large, "wb") as file:
        file.truncate(8 << 20)
    words = "tar: rows: Cannot write: No space left on device"
    script = f"(echo tar: rows: Wrote only 4096 of 5120 bytes; yes '{words}' | head -n 200000) >&2; touch {said}"
    feed = Remote.feed

    def fed(self: Remote, argv: list[str], *rest: Any) -> subprocess.Popen[bytes]:
        return feed(self, ["timeout", "120", "sh", "-c", f"{script}; cat > /dev/null; exit 2"], *rest)

    monkeypatch.setattr(Remote, "feed", fed)
    host = Host("cluster", 1, Remote(connection(login)), str(tmp_path / "far"))
    with pytest.raises(JobFailed, match=f"cluster: files can't be written below .*: {words}$"):
        copies.send(host, [large])
    assert said.exists(), "it could say all of it"


def test_what_a_driver_that_was_killed_while_it_copied_has_left_is_removed(login: Login, tmp_path: Path) -> None:
    run, far = RunDir(tmp_path / "run"), tmp_path / "far"
    left = Path(f"{far}{run.path}/secrets.json")
    other = {"name": "second", "root": str(far), "login": asdict(login), "docker_host": None}
    native = {"host": socket.gethostname(), "docker_host": "unix:///nowhere", "hosts": [other]}
    handle = JobHandle("docker", "run", str(run.path), native)
    run.path.mkdir()
    write_atomic(left, "{}")
    with open(run.path / "driver.lock", "ab") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        assert settle.settle(handle) == []
        assert left.exists(), "a new driver is at work"
    assert settle.settle(handle) == []
    assert not left.parent.exists()
    assert far.is_dir()


class FakeRunner:
    """Whose stage needs something that takes long; meanwhile the run is asked to stop."""

    def __init__(self) -> None:
        self.native: dict[str, Any] = {}
        self.driver: Driver | None = None

    def close(self) -> None:
        pass

    @contextmanager
    def launched(
        self, stage: RenderedStage, attempt: int, job: str, log: Path, unwanted: Callable[[], bool]
    ) -> Iterator[Started]:
        assert self.driver is not None
        assert not unwanted()
        self.driver.request_stop(15, None)
        assert unwanted()
        raise StageFailed("the copy was given up")
        yield


def test_a_run_that_is_stopped_before_its_stage_has_started_was_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, runner = RunDir(tmp_path), FakeRunner()
    monkeypatch.setattr("nemotron_recipes.executors.driver.sources.changed", lambda folder, digest: "")
    plan = {"id": "run", "code": {"digest": ""}, "stages": [{"name": "first", "fingerprint": "x", "placement": {}}]}
    runner.driver = Driver(run, plan, runner)
    assert runner.driver.drive([RenderedStage("first", {}, (), {}, str(run.stage("first").path))]) == 130
    assert [event["event"] for event in read_jsonl(run.events)] == ["cancelled"]
