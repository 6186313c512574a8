"""What `runs watch` shows: from files alone, whatever they hold, on a terminal and off it."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemotron_recipes.cli.chart import Curve, chart
from nemotron_recipes.cli.tail import Tail
from nemotron_recipes.cli.watch import Board, _Plain, last_row, memory_texts
from nemotron_recipes.executors.local.executor import LocalExecutor
from nemotron_recipes.pulse import Beat
from nemotron_recipes.rundir import RunDir, append_event
from nemotron_recipes.spec import JobFacts, JobHandle, Outlook, to_json
from tests.helpers.cli import ROOT, nemotron
from tests.helpers.executor_harness import placement
from tests.helpers.plans import plan_of, probe_stage

GIB = 2**30


def write_rows(run: RunDir, losses: list[float | None], steps: int = 10) -> None:
    stage = run.stage("sft")
    stage.path.mkdir(parents=True, exist_ok=True)
    with open(stage.metrics, "a") as metrics:
        for step, loss in enumerate(losses, 1):
            metrics.write(json.dumps({"step": step, "steps": steps, "loss": loss, "seconds_per_step": 2.0}) + "\n")


def beat(run: RunDir, rank: int, memory: int | None) -> None:
    file = run.stage("sft").heartbeat(1, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    peak = memory * 2 if memory is not None else None
    file.write_text(Beat(rank, 0.0, "training", memory=memory, memory_peak=peak, host=f"node{rank}").to_json())


def test_a_chart_shows_the_course_and_its_ends() -> None:
    lines = chart([4.0, 3.0, 2.0, 1.0], 60, 4)
    assert [line.split()[-1] for line in lines] == ["█", "█▆", "██▃", "███▁"]
    assert (lines[0].split()[0], lines[-1].split()[0]) == ("4", "1")
    assert len(chart([float(n) for n in range(1000)], 40, 3)[-1]) <= 40
    assert [line.split() for line in chart([2.0, 2.0], 40, 2)] == [["2"], ["2", "██"]]
    assert chart([], 40, 4) == chart([1.0], 5, 4) == chart([1.0], 40, 0) == []


def test_a_curve_of_a_long_run_stays_small_and_ends_where_it_ends() -> None:
    curve = Curve(most=64)
    for step in range(100_000):
        curve.add(step, float(step))
    assert len(curve.values) <= 66
    assert curve.values[-1] == 99_999.0
    assert curve.values == sorted(curve.values)
    curve.add(50_000, 1.0)
    assert curve.values[-1] == 1.0
    assert max(curve.values) < 50_000, "it was resumed from there"
    curve.add(50_001, None)
    curve.add(50_002, float("inf"))
    assert curve.values[-1] == 1.0


def test_a_board_shows_queue_progress_curve_and_memory(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    board = Board("my-run", run)
    waiting = JobFacts("sft", "12", "PENDING", True, True, "Priority", "jobs of higher priority wait")
    board.look(Outlook("queued", (waiting,)))
    assert "  queue   sft is job 12, PENDING: jobs of higher priority wait (Priority)" in board.lines(120, 30)

    append_event(run.events, "stage-started", stage="sft", attempt=1, pid=1)
    write_rows(run, [4.0, None, 1.0])
    beat(run, 0, 3 * GIB)
    beat(run, 1, None)
    board.look(Outlook("running"))
    shown = "\n".join(board.lines(120, 30))
    assert "queue" not in shown
    assert "stage   sft: running" in shown
    assert "█" in shown
    assert "step 3/10  loss 1.0000  14.0 s left" in shown
    assert "rank 0 on node0: 3.00 GiB, at most 6.00 GiB" in shown
    assert "rank 1" not in shown, "it has no GPU"

    append_event(run.events, "stage-exited", stage="sft", attempt=1, exit_code=7, seconds=3.0)
    board.look(Outlook("ended"))
    assert "  stage   sft: exit 7 after 3.0 s" in board.lines(120, 30)
    assert len(board.lines(30, 2)) == 2
    assert max(map(len, board.lines(30, 5))) <= 30


def test_a_start_that_moves_by_seconds_is_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board, plain = Board("my-run", RunDir(tmp_path)), _Plain()
    hour = 3600 * (time.time() // 3600 + 2)
    for start in (hour, hour, hour + 3, hour + 1800):
        facts = JobFacts("sft", "12", "PENDING", True, True, "Priority", "others are before it", start=start)
        board.look(Outlook("queued", (facts,)))
        plain.board(board)
    assert capsys.readouterr().out.count("sft is job 12") == 2


def test_many_ranks_are_told_by_their_extremes() -> None:
    beats = tuple(Beat(rank, 0.0, "training", memory=(rank + 1) * GIB, memory_peak=99 * GIB) for rank in range(16))
    assert [*memory_texts(beats)] == ["16 GPUs: 1.00 GiB (rank 0) to 16.00 GiB (rank 15)"]


def test_nothing_that_a_run_holds_controls_the_terminal(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    evil = "s\x1b]0;owned\x07ft\x1b[2J\r[bold]x[/bold]\n\t!"
    append_event(run.events, "job-accepted", stage=evil, attempt=1, job="1\x1b[31m")
    append_event(run.events, "waiting", run="\x9b31mother")
    board = Board("na\x1bme", run)
    facts = JobFacts("sft", "1", "PENDING", True, True, "\x1b[5m", "\x08\x08")
    board.look(Outlook("queued", (facts,)))
    shown = "".join(board.lines(200, 30))
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", shown)
    assert r"\x1b]0;owned\x07" in shown
    assert "[bold]x[/bold]" in shown


def test_the_last_row_of_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_rows(run, [float(n) for n in range(5000)], steps=5000)
    with open(run.stage("sft").metrics, "a") as metrics:
        metrics.write('{"step": 5000, "validation_loss": 1}\n{"step": 5001, "lo')
    row = last_row(run.stage("sft"))
    assert row is not None
    assert (row["step"], row["loss"]) == (5000, 4999.0)
    tail = Tail(run.stage("sft").metrics, last=1000)
    assert len([*tail.lines()]) < 20
    assert last_row(run.stage("nothing")) is None


def run_on_terminal(cwd: Path, *words: str) -> str:
    """What `nemotron ...` draws on a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nemotron_recipes", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = io.BytesIO()

    def read() -> None:
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end is closed
                return
            if not piece:
                return
            said.write(piece)

    reader = threading.Thread(target=read)
    reader.start()
    process.wait(timeout=120)
    reader.join(timeout=120)
    os.close(ours)
    return said.getvalue().decode()


def test_on_a_terminal_and_off_it(tmp_path: Path) -> None:
    folder = tmp_path / "nemotron-output" / "runs" / "run-1"
    run = RunDir(folder)
    plan = plan_of(folder, probe_stage("sft", placement=placement(LocalExecutor())))
    write_rows(run, [4.0, 3.0])
    run.plan.write_text(to_json(plan))
    run.handle.write_text(to_json(JobHandle("local", plan.id, plan.run_dir, {"host": "h", "pid": 1, "created": 0.0})))
    append_event(run.events, "driver-started", pid=1)
    append_event(run.events, "stage-started", stage="sft", attempt=1, pid=1)
    append_event(run.events, "stage-exited", stage="sft", attempt=1, exit_code=0, seconds=1.0)
    append_event(run.events, "finished", state="failed", stage="sft", cause="x")
    plain = nemotron(tmp_path, "runs", "watch", folder.name, code=1)
    assert "stage   sft: exit 0 after 1.0 s" in plain
    assert "step 2/10  loss 3.0000" in plain
    assert "failed" in plain.splitlines()[-1]
    assert "\x1b" not in plain
    assert "failed" in nemotron(tmp_path, "runs", "watch")
    drawn = run_on_terminal(tmp_path, "runs", "watch", folder.name)
    assert "\x1b[?1049h" in drawn, "a screen of its own"
    assert "\x1b[?1049l" in drawn, "which is given back"
    assert "stage   sft: exit 0" in drawn
    assert "█" in drawn
    assert "failed" in drawn.partition("\x1b[?1049l")[2]


def test_watching_costs_nothing_where_nobody_watches() -> None:
    code = "import sys, nemotron_recipes.cli.runs; sys.exit(bool({'rich', 'hydra'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
