"""Following a run on a terminal: what the bar shows, and that no row of the metrics stops the follower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron_recipes.cli import attach
from nemotron_recipes.cli.follow import Follower
from nemotron_recipes.rundir import RunDir, append_event
from nemotron_recipes.spec import JobHandle

STEP = {"step": 2, "steps": 4, "loss": 1.5, "seconds_per_step": 2.0}
VALIDATION = {"step": 2, "steps": 4, "validation_loss": 1.25}


def started(tmp_path: Path, log: str, *metrics: dict[str, object]) -> RunDir:
    run = RunDir(tmp_path)
    stage = run.stage("sft")
    stage.log(1, 0).parent.mkdir(parents=True)
    stage.log(1, 0).write_text(log)
    stage.metrics.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    append_event(run.events, "stage-started", stage="sft", attempt=1, pid=1)
    return run


def test_a_validation_row_after_the_last_step_leaves_the_bar_at_that_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Follower(started(tmp_path, "", STEP, VALIDATION), bar=True).poll(last=True)
    assert "step 2/4  loss 1.5000  4.0 s left" in capsys.readouterr().out


def test_a_validation_row_alone_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Follower(started(tmp_path, "", VALIDATION), bar=True).poll(last=True)
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize("bar", [True, False])
def test_the_bar_replaces_the_workers_own_step_lines_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bar: bool
) -> None:
    log = "step 2/4 [####....] loss 1.5000 lr 1e-3\nstep 2/4 validation loss 1.2500\nstep by step\n"
    Follower(started(tmp_path, log, STEP), bar=bar).poll(last=True)
    shown = capsys.readouterr().out
    assert ("lr 1e-3" in shown) is not bar
    assert "step 2/4 validation loss 1.2500" in shown
    assert "step by step" in shown


def test_a_second_ctrl_c_says_that_the_end_was_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attach.lifecycle, "watch", interrupted)
    monkeypatch.setattr(attach.lifecycle, "cancel", interrupted)
    monkeypatch.setattr(attach.lifecycle, "detaches", lambda handle: False)
    assert attach.attached(JobHandle("docker", "r", str(tmp_path), {}), as_json=False) == 130
    assert "its end was not waited for: nemotron runs show r" in capsys.readouterr().err


def test_a_network_that_goes_and_comes_back_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = started(tmp_path, "")
    append_event(run.events, "link-down", stage="sft", words="spark1: enp1s0f1np1 is down")
    append_event(run.events, "link-up", stage="sft", words="after 4 s")
    Follower(run).poll(last=True)
    out = capsys.readouterr().out
    assert "network between the hosts is gone: spark1: enp1s0f1np1 is down" in out
    assert "network between the hosts is back: after 4 s" in out
