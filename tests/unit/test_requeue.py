"""When a job goes back into the queue, and when a worker must stop for it: the decisions alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.reconcile import Evidence, judge
from nemotron_recipes.errors import UserError
from nemotron_recipes.executors.slurm.control import JobState
from nemotron_recipes.executors.slurm.files import NodeReport
from nemotron_recipes.executors.slurm.outcome import missing_events
from nemotron_recipes.executors.slurm.profile import SlurmProfile, contradictions, limit_seconds
from nemotron_recipes.executors.slurm.requeue import (
    JOB_END_ENV,
    WISH_ENV,
    alarm_of,
    deadline_of,
    ended_as,
    leave_wish,
    requeued_event,
    setup_lines,
    wish_of,
)
from nemotron_recipes.rundir import RunDir, append_event, read_jsonl
from nemotron_recipes.worker.deadline import Pace, deadline_from
from tests.unit.test_slurm_outcome import PRINTS, run, view_of

__all__ = ["run"]  # a fixture


def node(number: int, code: int, **fields: Any) -> NodeReport:
    return NodeReport(number, f"node{number}", 10.0 + number, code, **fields)


@pytest.mark.parametrize(
    ("reports", "wish"),
    [
        ([node(0, 75)], "time-limit"),
        ([node(0, 1, rank=1, rank_exit_code=75), node(1, 143, stopped=True)], "time-limit"),
        ([node(0, 143, stopped=True, overdue=True)], "time-limit"),
        ([node(0, 143, stopped=True, overdue=True), node(1, 1, rank=1, rank_exit_code=130)], "time-limit"),
        ([node(0, 143, stopped=True, overdue=True), node(1, 1, rank=1, rank_exit_code=7)], ""),
        ([node(0, 143, stopped=True), node(1, 1, stopped=True)], "signal"),
        ([node(0, 1, rank=0, rank_exit_code=7), node(1, 143, stopped=True)], ""),
        ([node(0, 0), node(1, 0)], ""),
    ],
)
def test_who_wants_to_go_on(reports: list[NodeReport], wish: str) -> None:
    assert wish_of(reports, len(reports), deadline=1.0) == wish


def test_a_node_that_fell_silent_is_no_wish() -> None:
    """Its launcher was killed; srun told the others to stop."""
    assert wish_of([node(0, 143, stopped=True)], 2, deadline=None) == ""


def test_the_exit_code_counts_without_a_deadline_too() -> None:
    assert wish_of([node(0, 75)], 1, deadline=None) == "worker"


def test_the_deadline() -> None:
    assert deadline_of({JOB_END_ENV: "10000"}, None, now=0.0) == 10000 - 60
    assert deadline_of({JOB_END_ENV: "300"}, None, now=0.0) == 300 - 30
    assert deadline_of({JOB_END_ENV: "300"}, 100.0, now=250.0) == 200
    assert alarm_of({JOB_END_ENV: "300"}, 200.0) == 210
    assert alarm_of({JOB_END_ENV: "300"}, 296.0) == 297
    assert alarm_of({JOB_END_ENV: "300"}, 300.0) == 300
    for text in ("", "N/A", "NONE", "Unknown"):
        assert deadline_of({JOB_END_ENV: text}, 100.0, now=0.0) is None


@pytest.mark.parametrize(
    ("word", "cause"),
    [
        ("NODE_FAIL", "node-failure"),
        ("PREEMPTED", "preempted"),
        ("REQUEUED", "scheduler"),
        ("CANCELLED by 0", "scheduler"),
        ("", "scheduler"),
    ],
)
def test_what_slurm_calls_the_end_before(word: str, cause: str) -> None:
    assert ended_as(word) == cause


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("02:00:01", 7201),
        ("1-12", 36 * 3600),
        ("1-00:30", 86400 + 1800),
        ("1-00:00:05", 86405),
        ("soon", None),
        (None, None),
    ],
)
def test_time_limits_in_seconds(text: str | None, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


def test_a_margin_as_long_as_the_limit_is_refused() -> None:
    assert [field for field, *_ in contradictions(SlurmProfile(time="5", save_margin=300))] == ["save_margin"]
    assert not [*contradictions(SlurmProfile(time="5", save_margin=299))]


@pytest.mark.parametrize(
    ("state", "preempted", "cause"),
    [("RUNNING", "None", "signal"), ("RUNNING", "2026-01-01T00:00:00", "preempted"), ("CANCELLED", "None", None)],
)
def test_the_shell_of_the_batch_script(tmp_path: Path, state: str, preempted: str, cause: str | None) -> None:
    """In a real bash; of Slurm's commands only what they answer matters here (tests/slurm has the real ones)."""
    folder = RunDir(tmp_path / "it's $HOME")
    stage = folder.stage("first")
    (stage.path / "logs").mkdir(parents=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    answer = f"JobId=7 JobState={state} Restarts=0 PreemptTime={preempted} End=x"
    for name, text in (("scontrol", f'echo "$*" >> {tmp_path}/calls; echo "{answer}"'), ("squeue", "echo 1234")):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    wish = {WISH_ENV: str(stage.path / "logs" / "requeue-7")}
    event = requeued_event(stage, "first", 1, "signal", 1)
    script = ["set -e", *setup_lines(folder, stage, 2), f'cp {tmp_path}/wish "${WISH_ENV}"', "exit 75"]
    assert leave_wish(wish, [event])
    (stage.path / "logs" / "requeue-7").rename(tmp_path / "wish")
    folder.events.write_text('{"event": "cut sho')
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", "\n".join(script)], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert [entry["cause"] for entry in read_jsonl(folder.events, strict=True)] == ([cause] if cause else [])
    assert ("requeue 7" in (tmp_path / "calls").read_text()) is bool(cause)


def test_the_pace() -> None:
    """Slowest recent step + evaluation + save must still fit."""
    pace = Pace(deadline=100.0)
    pace.began(0.0)
    pace.step_done(5.0)
    pace.step_done(7.0)
    pace.evaluated(10.0)
    assert pace.saved(14.0) == 4.0
    assert not pace.must_stop(87.9)  # 5 + 3 + 4
    assert pace.must_stop(88.0)
    for step in range(20):
        pace.step_done(15.0 + step)
    assert not pace.must_stop(91.9), "the slow first step is long ago"
    assert not Pace(None).must_stop(1e12)
    assert Pace(100.0, save_seconds=30.0).must_stop(70.0)


def test_a_deadline_that_is_no_time() -> None:
    assert deadline_from({}) is None
    assert deadline_from({"NEMOTRON_DEADLINE": "12.5"}) == 12.5
    with pytest.raises(UserError):
        deadline_from({"NEMOTRON_DEADLINE": "tomorrow"})


def test_between_two_attempts_nothing_has_failed(run: RunDir) -> None:
    append_event(run.events, "stage-exited", stage="first", attempt=1, exit_code=75, seconds=1.0)
    append_event(run.events, "requeued", stage="first", attempt=1, cause="time-limit", step=4, requeues=1)
    from nemotron_recipes.artifacts.records import load_run

    for alive in ("queued", "running"):
        view = load_run(run.path, lambda handle, alive=alive: alive)  # type: ignore[misc]
        assert view.stage("first").state == "pending"
        assert view.stage("first").note == "back in the queue (time-limit)"
        assert view.state in ("pending", "running")


def test_what_was_put_back_and_never_started_again(run: RunDir) -> None:
    """The second attempt's setup failed before any launcher ran: its end is not the first one's."""
    append_event(run.events, "requeued", stage="first", attempt=1, cause="node-failure", step=None, requeues=1)
    told = missing_events(run, {"first": JobState("11", "FAILED", exit_code=9, restarts=1)}, PRINTS)
    assert "before anything was started" in told[-1]["cause"]
    view = view_of(run, JobState("11", "FAILED", exit_code=9, restarts=1))
    assert view.state == "failed"


def test_a_requeue_that_slurm_refused(run: RunDir) -> None:
    stage = run.stage("first")
    append_event(run.events, "stage-exited", stage="first", attempt=1, exit_code=75, seconds=1.0)
    append_event(run.events, "requeued", stage="first", attempt=1, cause="time-limit", step=4, requeues=1)
    (stage.path / "logs" / "requeue-11").write_text("{}\n")
    (stage.path / "logs" / "slurm-11.out").write_text("Requested operation is presently disabled for job 11\n")
    view = view_of(run, JobState("11", "FAILED", exit_code=75))
    assert (view.state, view.stage("first").state) == ("failed", "failed")
    (finished,) = missing_events(run, {"first": JobState("11", "FAILED", exit_code=75)}, PRINTS)
    assert "presently disabled" in finished["cause"]


def test_told_to_stop_is_not_cancelled_while_the_launcher_is_there() -> None:
    record = {"state": "cancelled", "attempt": 1}
    assert judge(Evidence(started=True, record=record, liveness="running"))[0] == "running"
    assert judge(Evidence(started=True, record=record, liveness="ended"))[0] == "cancelled"
    assert judge(Evidence(started=True, record=record, liveness="running", launched=False))[0] == "cancelled"
