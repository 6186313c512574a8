"""The same global batch gives the same loss curve, however it is shared out, and also after an interruption."""

import os
import signal
import time

import pytest

from nemotron_recipes.pulse import read_beats
from nemotron_recipes.rundir import StageDir, latest_checkpoint, read_json
from tests.helpers.training import events, finish, losses, prepared, start, worker_file

pytestmark = pytest.mark.e2e
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "sft", "sft", train=200)


def stage_with(tmp, name, data, nproc=1, micro=8, **sections):
    train = {"train_iters": STEPS, "global_batch_size": 8, "micro_batch_size": micro}
    sections = {"evaluation": {"rows": 0}, "checkpoint": {"save_interval": 4, "keep": 2}, **sections}
    return worker_file(tmp / name, data, nproc=nproc, train=train, **sections)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data):
    """The undisturbed run on one process."""
    tmp = tmp_path_factory.mktemp("reference")
    assert finish(start(stage_with(tmp, "stage", data))) == 0
    return tmp / "stage"


def test_two_processes_and_small_micro_batches_give_the_same_losses(tmp_path, data, reference):
    expected = losses(reference)
    assert len(expected) == STEPS and expected[-1] < 0.6 * expected[0]
    for name, nproc, micro in (("accumulated", 1, 2), ("two", 2, 2)):
        assert finish(start(stage_with(tmp_path, name, data, nproc, micro), nproc)) == 0
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-3), name
        beats = read_beats(StageDir(tmp_path / name), 1)
        assert [(beat.rank, beat.phase, beat.step) for beat in beats] == [(r, "ending", STEPS) for r in range(nproc)]
        assert all(beat.step_seconds > 0 and beat.save_seconds > 0 for beat in beats)


def test_stopped_killed_and_continued_gives_the_same_losses(tmp_path, data, reference):
    """SIGTERM ends attempt 1 after a step with a checkpoint, SIGKILL ends attempt 2 anywhere, attempt 3 finishes."""
    path, stage = stage_with(tmp_path, "stage", data), tmp_path / "stage"

    first = start(path)
    wait_for_step(stage, 5, first)
    first.terminate()
    assert finish(first) == 130
    assert read_json(StageDir(stage).record)["state"] == "cancelled"
    (stopped,) = [event for event in events(stage) if event["event"] == "stopped"]
    assert latest_checkpoint(StageDir(stage).checkpoints).name == f"iter_{stopped['step']:07d}"
    assert len(losses(stage)) == stopped["step"] < STEPS

    second = start(path, attempt=2)
    wait_for_step(stage, stopped["step"] + 2, second)
    os.killpg(second.pid, signal.SIGKILL)
    assert finish(second) == -signal.SIGKILL

    assert finish(start(path, attempt=3)) == 0
    assert losses(stage) == pytest.approx(losses(reference), rel=1e-6)
    (ready,) = [event for event in events(stage, attempt=3) if event["event"] == "ready"]
    assert ready["resume_from"] is not None
    folders = sorted(p.name for p in StageDir(stage).checkpoints.glob("iter_*"))
    assert folders[-1] == f"iter_{STEPS:07d}" and len(folders) == 2


def wait_for_step(stage, step, process):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if len([1 for line in open_lines(StageDir(stage).metrics) if '"loss"' in line]) >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} never came; exit code {process.poll()}")


def open_lines(path):
    return path.read_text().splitlines() if path.exists() else []
