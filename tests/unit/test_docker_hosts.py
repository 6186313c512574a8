"""What is made of containers on several hosts: whose failure it was, and how the others end. Containers are faked."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.executors import memory
from nemotron_recipes.executors.docker import hosts as docker_hosts
from nemotron_recipes.executors.docker.hosts import Part, Together
from nemotron_recipes.executors.driver import Blamed
from nemotron_recipes.executors.hosts.copies import Back
from nemotron_recipes.executors.hosts.network import Host
from nemotron_recipes.executors.memory import GIB, Memory
from nemotron_recipes.executors.remote.transport import HERE
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import RunDir, read_jsonl
from nemotron_recipes.spec import RenderedStage

OPTIONS = {"hosts_lost_seconds": 0.0, "grace_seconds": 0.0, "memory_stop_gib": None}
REPORT = """Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  rank      : {rank} (local_rank: 0)
  exitcode  : {code} (pid: 7)
"""


@dataclasses.dataclass
class FakeContainer:
    id: str
    code: int | None = None
    asked: bool = False
    away: str = ""

    def wait(self, seconds: float) -> bool:
        time.sleep(min(seconds, 0.05))
        return self.code is not None

    def ask(self) -> None:
        self.asked = True

    def stop(self, grace: float) -> None:
        self.code, self.asked = 143 if self.code is None else self.code, True

    def give_up(self, why: str) -> None:
        self.code, self.away = 137, why

    def ended(self) -> tuple[int, str]:
        return self.code or 0, ""

    def blamed(self, log: Path) -> Blamed:
        return Blamed(log)

    def close(self, log: Path) -> None:
        pass


@pytest.fixture
def together(tmp_path: Path) -> Iterator[Callable[..., Together]]:
    """Makes one of two containers; nobody looks at them any more after the test."""
    run = RunDir(tmp_path)
    stage = RenderedStage("first", {}, (), {}, str(tmp_path / "first"))
    all_made: list[Together] = []

    def make(*containers: FakeContainer, down: Any = lambda: (0.0, ""), **options: Any) -> Together:
        named = enumerate(zip(("spark1", "spark2"), containers, strict=True))
        hosts = [(Host(name, node, HERE), container) for node, (name, container) in named]
        parts = [Part(host, container, Back(host, run)) for host, container in hosts]  # type: ignore[arg-type]
        all_made.append(Together(parts, stage, 1, {**OPTIONS, **options}, run, down))
        return all_made[-1]

    yield make
    for made in all_made:
        made.close(Path("log"))


def said(tmp_path: Path, node: int, rank: int, code: int, failure: bool) -> None:
    """What torchrun, and the rank itself, left behind."""
    stage = RunDir(tmp_path).stage("first")
    write_atomic(stage.launcher_log(1, node), REPORT.format(rank=rank, code=code))
    if failure:
        write_atomic(stage.failure(1, rank), json.dumps({"time": 0.0}))


def test_a_rank_that_was_killed_comes_before_one_that_fell_over_it(
    together: Callable[..., Together], tmp_path: Path
) -> None:
    made = together(FakeContainer("a", 1), FakeContainer("b", 1))
    said(tmp_path, 0, 0, 1, failure=True)
    said(tmp_path, 1, 1, -9, failure=False)
    assert made.wait(0.0)
    blamed = made.blamed(RunDir(tmp_path).stage("first").launcher_log(1))
    assert (blamed.host, blamed.log.name, blamed.cause) == ("spark2", "launcher.node-1.log", "")


def test_of_two_that_say_what_they_fell_over_the_first_end_counts(
    together: Callable[..., Together], tmp_path: Path
) -> None:
    made = together(first := FakeContainer("a"), FakeContainer("b", 1))
    for node in (0, 1):
        said(tmp_path, node, node, 1, failure=True)
    assert not made.wait(0.0)
    first.code = 1
    assert made.wait(0.0)
    assert made.blamed(Path("log")).host == "spark2"


def test_the_others_are_asked_and_then_ended(
    together: Callable[..., Together], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_hosts, "_ECHO_SECONDS", -1.0)
    made = together(first := FakeContainer("a"), FakeContainer("b", 7), grace_seconds=-1.0)
    assert (made.wait(0.0), first.asked) == (False, False), "it may fall over it by itself"
    assert (made.wait(0.0), first.asked, first.code) == (False, True, None)
    assert (made.wait(0.0), first.code) == (True, 143)
    assert made.ended() == (7, "")
    assert made.blamed(Path("log")).host == "spark2"


def test_a_host_that_stays_away_has_failed_and_is_noted(
    together: Callable[..., Together], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_hosts, "_ECHO_SECONDS", -1.0)
    made = together(first := FakeContainer("a"), FakeContainer("b", away="no route"), grace_seconds=-1.0)
    while not made.wait(0.0):
        pass
    assert first.code == 143
    blamed = made.blamed(Path("log"))
    assert blamed.host == "spark2"
    assert "can't be reached any more (no route)" in blamed.cause
    made.close(Path("log"))
    (left,) = read_jsonl(RunDir(tmp_path).events)
    assert (left["event"], left["host"], left["container"]) == ("left-behind", "spark2", "b")


def test_memory_is_watched_on_all_hosts(
    together: Callable[..., Together], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"spark1": Memory(120 * GIB, 50 * GIB, 0), "spark2": Memory(120 * GIB, 3 * GIB, 0)}
    monkeypatch.setattr(memory, "read_memory", lambda: figures["spark1"])
    made = together(FakeContainer("a"), FakeContainer("b"))
    assert made.shortage(6.0) == ""
    made._memory["spark2"] = (time.monotonic(), figures["spark2"])
    assert made.shortage(6.0).startswith("spark2: 3.0 GiB of memory were available")
    made._memory["spark2"] = (time.monotonic() - 60.0, figures["spark2"])
    assert made.shortage(6.0) == "", "a figure that old says nothing"


def test_a_network_that_stays_away_ends_all_and_names_what_is_kept(
    together: Callable[..., Together], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_hosts, "_ECHO_SECONDS", -1.0)
    gone = [5.0, "spark1: enp1s0f1np1 is down"]
    containers = FakeContainer("a"), FakeContainer("b")
    options = {"hosts_lost_seconds": 60.0, "grace_seconds": -1.0}
    made = together(*containers, down=lambda: gone, **options)
    assert not made.wait(0.0) and not made.wait(0.0)
    assert [each.asked for each in containers] == [False, False], "it may come back"
    gone[0] = 61.0
    while not made.wait(0.0):
        pass
    write_atomic(RunDir(tmp_path).stage("first").checkpoints / "latest_checkpointed_iteration.txt", "4")
    (RunDir(tmp_path).stage("first").checkpoints / "iter_0000004").mkdir()
    blamed = made.blamed(Path("log"))
    assert (blamed.host, blamed.ended_by) == ("", "NETWORK")
    assert "was gone for 61 s (spark1: enp1s0f1np1 is down); go on from iter_0000004" in blamed.cause
    fell = together(FakeContainer("a"), FakeContainer("b", 1), down=lambda: (2.0, "spark2: x"), **options)
    while not fell.wait(0.0):
        pass
    assert "a rank failed while the network between the hosts was gone (spark2: x)" in fell.blamed(Path("log")).cause
