"""Whether a stage comes further, from what lies on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.records import load_run
from nemotron_recipes.artifacts.stages import _alive_or_stalled
from nemotron_recipes.executors import watchdog
from nemotron_recipes.executors.local.executor import LocalExecutor
from nemotron_recipes.pulse import UNKNOWN_SAVE, Beat, Phase, allowance, log_stopped, pulse, read_beats
from nemotron_recipes.rundir import RUN_ID_ENV, TRACKER, StageDir, append_event
from nemotron_recipes.spec import JobHandle
from tests.helpers.executor_harness import placement, wait_for
from tests.helpers.plans import plan_of, probe_stage, write_run

NOW = 1_000_000.0
STEPPING = Beat(0, NOW, "training", 12, 100, step_seconds=2.0, save_seconds=30.0)


def stage_with(tmp_path: Path, *beats: Beat) -> StageDir:
    stage = StageDir(tmp_path)
    for beat in beats:
        path = stage.heartbeat(1, beat.rank)
        path.parent.mkdir(exist_ok=True)
        path.write_text(beat.to_json())
    return stage


def test_no_heartbeat_no_verdict(tmp_path: Path) -> None:
    assert pulse(StageDir(tmp_path), 1, NOW) is None


def test_silence_is_held_against_the_stages_own_pace(tmp_path: Path) -> None:
    stage = stage_with(tmp_path, STEPPING, replace(STEPPING, rank=1))
    assert [bool(found := pulse(stage, 1, NOW + s, 100, 10)) and found.stalled for s in (200, 202)] == [False, True]
    assert [bool(found := pulse(stage, 1, NOW + s, 1, 50)) and found.stalled for s in (50, 52)] == [False, True]


def test_a_rank_that_has_not_started_holds_up_the_others(tmp_path: Path) -> None:
    found = pulse(stage_with(tmp_path, replace(STEPPING, world=2)), 1, NOW + 9999)
    assert found is not None
    assert not found.stalled


def test_a_save_takes_its_time(tmp_path: Path) -> None:
    assert allowance(replace(STEPPING, phase="saving"), 10, 10) == 10 * 2.0 + 1 + 3 * 30.0
    assert allowance(replace(STEPPING, phase="saving", save_seconds=0), 10, 10) == 10 * 2.0 + 1 + UNKNOWN_SAVE


@pytest.mark.parametrize("phase", ["starting", "ending"])
def test_nothing_is_concluded_of_a_start_or_an_end(tmp_path: Path, phase: Any) -> None:
    found = pulse(stage_with(tmp_path, replace(STEPPING, phase=phase)), 1, NOW + 9999)
    assert found is not None
    assert not found.stalled


def test_a_checkpoint_counts_as_movement(tmp_path: Path) -> None:
    stage = stage_with(tmp_path, STEPPING)
    stage.checkpoints.mkdir()
    (stage.checkpoints / TRACKER).write_text("12")
    os.utime(stage.checkpoints / TRACKER, (NOW + 500, NOW + 500))
    found = pulse(stage, 1, NOW + 510, 20, 100)
    assert found is not None
    assert not found.stalled
    assert found.silent == (0,)


def test_the_rank_that_is_behind_is_named(tmp_path: Path) -> None:
    others = [replace(STEPPING, rank=rank) for rank in (0, 2, 3)]
    stage = stage_with(tmp_path, *others, replace(STEPPING, rank=1, phase="loading", time=NOW - 2))
    found = pulse(stage, 1, NOW + 300, 20, 100)
    assert found is not None
    assert (found.stalled, found.behind, found.silent, found.step) == (True, (1,), (0, 1, 2, 3), 12)
    assert "last step 12 of 100; rank 1 is behind the others (loading); all ranks are silent" in found.words()


def test_a_log_that_stopped_while_steps_go_on(tmp_path: Path) -> None:
    stage = stage_with(tmp_path, STEPPING)
    log = stage.log(1, 0)
    log.parent.mkdir(parents=True)
    log.write_text("step 1\n")
    os.utime(log, (NOW, NOW))
    rows = [{"step": step, "time": NOW + 10 * step, "loss": 1.0} for step in range(5)]
    stage.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert log_stopped(stage, 1) == "", "two rows without a line may be on their way"
    stage.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert log_stopped(stage, 1) == "rank 0's log stopped 40 s ago, while steps went on to 4"


@pytest.mark.parametrize(("phase", "said"), [("training", True), ("starting", False)])
def test_a_silent_log_means_something_where_ranks_say_that_they_train(tmp_path: Path, phase: Phase, said: bool) -> None:
    """Trainers of other projects write no heartbeats, and some log their steps on the last rank."""
    now = time.time()
    stage = stage_with(tmp_path, replace(STEPPING, time=now, phase=phase))
    stage.log(1, 0).parent.mkdir(parents=True)
    stage.log(1, 0).write_text("it begins\n")
    os.utime(stage.log(1, 0), (now - 100, now - 100))
    stage.metrics.write_text("".join(f'{{"step": {n}, "time": {now - 50 + n}, "loss": 1.0}}\n' for n in range(5)))
    state, words = _alive_or_stalled({}, stage, 1, "")
    assert (state, "rank 0's log stopped" in words) == ("running", said)


def worker(tmp_path: Path, rank: int, world: int, **config: Any) -> subprocess.Popen[bytes]:
    """A rank of the probe in the stage folder `<tmp>/run/first`."""
    folder = tmp_path / "run" / "first"
    file = tmp_path / "worker.json"
    stage = {"id": "the-run", "stage": "first", "dir": str(folder), "store": str(tmp_path / "store")}
    tree = {"worker": "probe", "run": {**stage, "fingerprint": "f"}, "inputs": {}, "outputs": [], "action": "steps"}
    file.write_text(json.dumps({**tree, **config}))
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "NEMOTRON_ATTEMPT": "1", RUN_ID_ENV: "the-run"}
    argv = [sys.executable, "-m", "tests.helpers.worker_probe", "--config", str(file)]
    out = subprocess.PIPE  # a file could be sought in, and Python remembers that when a log that is a pipe takes over
    return subprocess.Popen(argv, env=env, cwd=Path(__file__).parents[2], stdout=out, stderr=out)


@pytest.fixture
def ranks() -> Any:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_a_rank_that_hangs(tmp_path: Path, ranks: list[subprocess.Popen[bytes]]) -> None:
    """Two real ranks: `runs show` says where each is, and the watchdog's signal shows what the one does that hangs."""
    place = placement(LocalExecutor(), stall_seconds=4.0, stall_factor=1.0)
    plan = plan_of(tmp_path / "run", probe_stage("first", placement=place))
    write_run(plan, LocalExecutor().render(plan))
    handle = JobHandle("local", plan.id, plan.run_dir, {})
    (tmp_path / "run" / "handle.json").write_text(json.dumps(handle.__dict__))
    append_event(tmp_path / "run" / "events.jsonl", "stage-started", stage="first", attempt=1, pid=1)
    ranks += [worker(tmp_path, rank, 2, only=1, hang=4) for rank in (0, 1)]
    wait_for(
        lambda: (
            "last step 3 of 20; rank 1 is behind the others (loading)"
            in load_run(tmp_path / "run", lambda h: "running").stage("first").note
        )
    )
    assert load_run(tmp_path / "run", lambda h: "running").state == "stalled"

    stage = StageDir(tmp_path / "run" / "first")
    watchdog.dump_stacks(os.getpid(), "another-run")
    assert stage.stacks(1, 1).read_text() == ""
    watchdog.dump_stacks(os.getpid(), "the-run")
    wait_for(lambda: "hangs_here" in stage.stacks(1, 1).read_text())
    wait_for(lambda: "_train" in stage.stacks(1, 0).read_text())
    assert "hangs_here" not in stage.stacks(1, 0).read_text()
    assert [process.poll() for process in ranks] == [None, None], "whoever is asked goes on"


def test_a_rank_that_is_stopped_and_goes_on(tmp_path: Path, ranks: list[subprocess.Popen[bytes]]) -> None:
    """As on a node that stops: its heartbeat stands still, and moves again when it does."""
    stage = StageDir(tmp_path / "run" / "first")
    ranks.append(worker(tmp_path, 0, 1, steps=100_000))
    wait_for(lambda: read_beats(stage, 1) and read_beats(stage, 1)[0].step >= 2)
    ranks[0].send_signal(signal.SIGSTOP)
    wait_for(lambda: (found := pulse(stage, 1, time.time(), 1, 4.0)) and found.stalled)
    ranks[0].send_signal(signal.SIGCONT)
    wait_for(lambda: (found := pulse(stage, 1, time.time(), 1, 2.0)) and not found.stalled)


def test_a_log_that_cannot_be_written(tmp_path: Path, ranks: list[subprocess.Popen[bytes]]) -> None:
    """Its reader has stopped: the rank blocks in its print, and that is what its stack shows."""
    stage = StageDir(tmp_path / "run" / "first")
    stage.logs(1).mkdir(parents=True)
    os.mkfifo(stage.log(1, 0))
    reader = os.open(stage.log(1, 0), os.O_RDONLY | os.O_NONBLOCK)
    try:
        ranks.append(worker(tmp_path, 0, 1, steps=100_000, pause=0, padding=4000))
        found = wait_for(lambda: (f := pulse(stage, 1, time.time(), 1, 5.0)) and f.stalled and f)
        assert found.step < 100_000
        watchdog.dump_stacks(os.getpid(), "the-run")
        wait_for(lambda: "_train" in stage.stacks(1, 0).read_text())
    finally:
        os.close(reader)


def test_a_process_that_does_not_know_the_signal_is_left_alone() -> None:
    env = {**os.environ, RUN_ID_ENV: "the-run"}
    with subprocess.Popen(["sleep", "60"], env=env) as process:
        wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
        watchdog.dump_stacks(os.getpid(), "the-run")
        assert process.poll() is None
        watchdog.kill_tree(process.pid)
        assert process.wait() == -signal.SIGKILL
