"""Another project's training loop as a guest: how it is stopped in time and how its end is read."""

import os
import signal
import sys
import threading
import time

import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import JobFailed
from nemotron_recipes.rundir import DEADLINE_ENV, TRACKER, StageDir, append_event, read_jsonl
from nemotron_recipes.worker import guest as module
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.guest import CheckpointWatch, Guest, link_tree, step_of


@pytest.fixture
def context(tmp_path):
    stage = StageDir(tmp_path / "stage")
    stage.checkpoints.mkdir(parents=True)
    return Context(0, 1, 0, 1, stage, {"id": "r", "stage": "s"}, Store(tmp_path / "store"), {})


class Loop:
    """Fake of Megatron's and AutoModel's loops: their own SIGTERM handler sets a flag that ends the loop."""

    def __init__(self):
        self.told = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: self.told.set())

    def run(self, leave=lambda: None):
        assert self.told.wait(60)
        leave()


def events(context):
    return list(read_jsonl(context.dir.events(1, 0)))


def test_a_signal_ends_it_and_counts_as_a_wish(context):
    before = signal.getsignal(signal.SIGTERM)
    with Guest(context) as guest:
        loop = Loop()
        os.kill(os.getpid(), signal.SIGTERM)
        loop.run(leave=sys.exit)
    assert signal.getsignal(signal.SIGTERM) is before
    guest.conclude(3, 10)
    assert context.stop_seen and not context.time_is_up
    assert events(context)[-1]["reason"] == "signal"


def test_the_deadline_becomes_a_signal_in_time(context, monkeypatch):
    monkeypatch.setattr(module, "LEAST_RESERVE", 100.0)
    monkeypatch.setenv(DEADLINE_ENV, str(time.time() + 100.2))
    with Guest(context) as guest:
        Loop().run()
    guest.conclude(3, 10)
    assert context.stop_seen and context.time_is_up
    assert events(context)[-1] == {**events(context)[-1], "event": "stopped", "step": 3, "reason": "time-limit"}


def test_the_reserve_follows_the_saves_of_the_attempt_before(context, monkeypatch):
    append_event(context.dir.events(1, 0), "checkpoint-saved", step=1, seconds=300)
    context.attempt = 2
    monkeypatch.setenv(DEADLINE_ENV, "1000000000")
    assert Guest(context).alarm == 1000000000 - 600


def test_an_end_that_nobody_asked_for_is_a_failure(context):
    with Guest(context) as guest:
        pass
    with pytest.raises(JobFailed, match="after step 3 of 10 by itself"):
        guest.conclude(3, 10)


def test_the_last_step_is_an_end_whatever_came(context):
    with Guest(context) as guest:
        loop = Loop()
        os.kill(os.getpid(), signal.SIGTERM)
        loop.run()
    guest.conclude(10, 10)
    assert not context.stop_seen


@pytest.mark.parametrize("code", [1, "words"])
def test_a_bad_exit_stays_one(context, code):
    with pytest.raises(SystemExit), Guest(context):
        sys.exit(code)


def test_checkpoints_are_told_once_each(context):
    root = context.dir.checkpoints
    with CheckpointWatch(context):
        (root / "iter_0000004").mkdir()
        (root / "iter_0000004" / "shard").touch()
        (root / TRACKER).write_text("4\n")
    saved = [event for event in events(context) if event["event"] == "checkpoint-saved"]
    assert [event["step"] for event in saved] == [4]
    assert step_of(root / "iter_0000004") == 4


def test_linking_copies_nothing_where_it_can(tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "shard").write_text("weights")
    (source / "link").symlink_to("deep/shard")
    link_tree(source, tmp_path / "target")
    assert (tmp_path / "target/deep/shard").stat().st_ino == (source / "deep/shard").stat().st_ino
    assert not (tmp_path / "target/link").is_symlink() and (tmp_path / "target/link").read_text() == "weights"
