"""Files that grow, read in pieces: nothing lost, nothing whole in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from nemotron_recipes.cli.follow import Follower, show_logs
from nemotron_recipes.cli.tail import LONGEST, Tail
from nemotron_recipes.executors.local.executor import LocalExecutor
from nemotron_recipes.rundir import RunDir, append_event
from nemotron_recipes.spec import JobHandle, to_json
from tests.helpers.cli import ROOT
from tests.helpers.executor_harness import placement
from tests.helpers.plans import plan_of, probe_stage

MEGABYTE = 1 << 20


def test_whole_lines_come_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = Tail(log)
    assert list(tail.lines()) == []
    log.write_text("one\ntw")
    assert list(tail.lines()) == ["one"]
    assert list(tail.lines()) == []
    with open(log, "a") as more:
        more.write("o\nthree")
    assert list(tail.lines()) == ["two"]
    assert list(tail.lines(whole=False)) == ["three"]


def test_a_log_that_became_shorter_is_read_from_its_beginning(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\n")
    tail = Tail(log)
    assert list(tail.lines()) == ["one", "two"]
    log.write_text("new\n")
    assert list(tail.lines()) == ["new"]


def test_of_a_line_drawn_over_the_last_is_shown(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("10%\r50%\r100%\r\nnext\n")
    assert list(Tail(tmp_path / "log").lines()) == ["100%", "next"]


@pytest.mark.parametrize("shift", range(4))
def test_a_line_without_an_end_is_cut_between_letters(tmp_path: Path, shift: int) -> None:
    text = "x" * shift + "😀" * (LONGEST // 2)
    (tmp_path / "log").write_text(text)
    pieces = list(Tail(tmp_path / "log").lines(whole=False))
    assert len(pieces) >= 2
    assert "".join(pieces) == text


@pytest.mark.parametrize("end", ["\n", "\r", ""])
def test_a_long_log_is_followed_in_bounded_memory(tmp_path: Path, end: str) -> None:
    """16 MB, in lines, in one line that is drawn over and over, and in one line without any end."""
    log = tmp_path / "log"
    with open(log, "w") as file:
        for number in range(16):
            file.write((f"{number:0255d}" + (end or "-")) * (MEGABYTE // 256))
    tail, seen = Tail(log), 0
    tracemalloc.start()
    try:
        for line in tail.lines():
            seen += len(line)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTE
    assert tail.offset > 15 * MEGABYTE
    assert seen > 0


@pytest.mark.parametrize(
    "size", [pytest.param(24 * MEGABYTE, id="24MB"), pytest.param(2048 * MEGABYTE, id="2GB", marks=pytest.mark.long)]
)
def test_a_follower_of_a_huge_log_stays_small(tmp_path: Path, size: int) -> None:
    """The whole command, by the memory that it had at most; a line without an end is in the log as well."""
    run = RunDir(tmp_path / "nemotron-output" / "runs" / "run-1")
    plan = plan_of(run.path, probe_stage("sft", placement=placement(LocalExecutor())))
    log = run.stage("sft").log(1, 0)
    log.parent.mkdir(parents=True)
    run.plan.write_text(to_json(plan))
    run.handle.write_text(to_json(JobHandle("local", plan.id, plan.run_dir, {"host": "h", "pid": 1, "created": 0.0})))
    append_event(run.events, "driver-started", pid=1)
    append_event(run.events, "stage-started", stage="sft", attempt=1, pid=1)
    append_event(run.events, "finished", state="failed", stage="sft", cause="x")

    def followed() -> int:
        """KiB at most."""
        command = [sys.executable, "-m", "nemotron_recipes", "runs", "logs", "-f", "run-1"]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 1, "as the run has failed"
        return usage.ru_maxrss

    log.write_text("one line\n")
    small = followed()
    line = b"step 12/100 [######....] loss 1.2345" + 4 * b" and some more words that a trainer says" + b"\n"
    piece = line * (MEGABYTE // len(line)) + b"#" * (MEGABYTE % len(line))
    with open(log, "wb") as handle:
        for _ in range(size // MEGABYTE):
            handle.write(piece)
        handle.write(b"." * 4 * MEGABYTE)
    assert followed() < small + 12 * 1024


def test_control_characters_never_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    for rank in (0, 1):
        log = run.stage("sft").log(1, rank)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"\x1b]0;title\x07\x1b[2J\x00gone\xff\xc2\x9b31m\n")
    append_event(run.events, "stage-started", stage="sft", attempt=1, pid=1, hosts=["node\x1b[2J"])
    append_event(run.events, "job-accepted", stage="sft", attempt=1, job="1\x07")
    for rank in (0, None):
        Follower(run, rank=rank).poll(last=True)
        show_logs(run, "sft", rank)
    shown = capsys.readouterr().out
    assert "gone" in shown
    assert [c for c in shown if not c.isprintable() and c != "\n"] == []
