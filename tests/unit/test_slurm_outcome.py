"""What Slurm's words for an end become: a table, without a Slurm. The words themselves are real ones (tests/slurm)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.records import RunView, load_run
from nemotron_recipes.executors.remote.there import inherited
from nemotron_recipes.executors.slurm import files
from nemotron_recipes.executors.slurm.control import JobState
from nemotron_recipes.executors.slurm.files import NodeReport
from nemotron_recipes.executors.slurm.outcome import missing_events
from nemotron_recipes.executors.slurm.script import profile_of
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.redact import reads_like_a_secret
from nemotron_recipes.rundir import RunDir, append_event, write_record
from nemotron_recipes.spec import to_json
from tests.helpers.plans import plan_of, probe_stage
from tests.unit.test_slurm_render import placement_of

PRINTS = {"first": "fingerprint-of-first", "second": "fingerprint-of-second"}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of two stages, submitted, of which the first has started."""
    run = RunDir(tmp_path / "run")
    stages = (probe_stage(name, placement=placement_of()) for name in PRINTS)
    plan = plan_of(run.path, *stages)
    write_atomic(run.plan, to_json(plan))
    native = {"jobs": {"first": "11", "second": "12"}, "names": {}}
    handle = {"executor": "slurm", "run": plan.id, "run_dir": plan.run_dir, "native": native}
    write_atomic(run.handle, json.dumps(handle))
    append_event(run.events, "submitting", attempts={"first": 1, "second": 1})
    write_atomic(files.submission(run), files.attempts_text({"first": 1, "second": 1}))
    append_event(run.events, "stage-started", stage="first", attempt=1, pid=1, job="11", hosts=["node1"])
    run.stage("first").logs(1).mkdir(parents=True)
    return run


def view_of(run: RunDir, *states: JobState) -> RunView:
    told = dict(zip(PRINTS, states, strict=False))
    return load_run(run.path, lambda handle: "ended", lambda handle: missing_events(run, told, PRINTS))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (JobState("11", "TIMEOUT", limit="00:10:00"), "time limit of 00:10:00"),
        (JobState("11", "NODE_FAIL", nodes="node[1-2]"), "node[1-2]"),
        (JobState("11", "OUT_OF_MEMORY", signal=9), "memory limit"),
        (JobState("11", "PREEMPTED"), "preempted"),
        (JobState("11", "BOOT_FAIL"), "could not be started"),
        (JobState("11", "DEADLINE"), "deadline"),
        (JobState("11", "LAUNCH_FAILED", reason="Prolog"), "LAUNCH_FAILED"),
    ],
)
def test_what_slurm_ended_has_failed_although_the_workers_were_told_to_stop(
    run: RunDir, state: JobState, words: str
) -> None:
    """They heard SIGTERM, stopped politely, and could not know why."""
    append_event(run.events, "stage-exited", stage="first", attempt=1, exit_code=130, seconds=1.0)
    write_record(run.stage("first"), {"attempt": 1, "state": "cancelled", "exit_code": 130, "fingerprint": "x"})
    view = view_of(run, state, JobState("12", "CANCELLED"))
    assert (view.state, view.stage("first").state, view.stage("second").state) == ("failed", "failed", "pending")
    assert words in view.explanation


def test_who_cancelled_is_kept(run: RunDir) -> None:
    (event,) = missing_events(run, {"first": JobState("11", "CANCELLED", by="1007")}, PRINTS)
    assert event == {"event": "cancelled", "stage": "first", "attempt": 1, "by": "1007"}
    assert view_of(run, JobState("11", "CANCELLED")).state == "cancelled"


def test_a_launcher_that_was_killed_leaves_the_word_to_another_node(run: RunDir) -> None:
    report = NodeReport(1, "node2", 5.0, 1, rank=3, rank_exit_code=139)
    files.write_report(run.stage("first"), 1, report)
    files.write_report(run.stage("first"), 1, NodeReport(0, "node1", 4.0, 143, stopped=True))
    exited, finished = missing_events(run, {"first": JobState("11", "FAILED", exit_code=1)}, PRINTS)
    assert exited["exit_code"] == 1
    assert "rank 3 ended with exit code 139 (SIGSEGV)" in finished["cause"]
    view = view_of(run, JobState("11", "FAILED", exit_code=1))
    assert (view.state, view.stage("first").exit_code) == ("failed", 1)


def test_a_node_that_refused_is_named(run: RunDir) -> None:
    files.write_report(run.stage("first"), 1, NodeReport(1, "node2", 5.0, 1, problem="it has 7 GPU(s)"))
    *_, finished = missing_events(run, {"first": JobState("11", "FAILED", exit_code=1)}, PRINTS)
    assert finished["cause"] == "node2: it has 7 GPU(s)"


def test_a_job_that_slurm_calls_done_needs_a_record(run: RunDir) -> None:
    done = [JobState("11", "COMPLETED"), JobState("12", "COMPLETED")]
    assert view_of(run, *done).state == "failed"
    for name, fingerprint in PRINTS.items():
        record: dict[str, Any] = {"attempt": 1, "state": "succeeded", "exit_code": 0, "fingerprint": fingerprint}
        write_record(run.stage(name), record)
    assert view_of(run, *done).state == "succeeded"


def test_a_stage_that_slurm_has_forgotten_is_known_by_its_record(run: RunDir) -> None:
    """Without accounting slurmctld forgets a job after minutes, while the next stage runs for hours."""
    late = {"second": JobState("12", "TIMEOUT", limit="1")}
    assert missing_events(run, late, PRINTS) == []
    record = {"attempt": 1, "state": "succeeded", "exit_code": 0, "fingerprint": PRINTS["first"]}
    write_record(run.stage("first"), record)
    append_event(run.events, "stage-exited", stage="first", attempt=1, exit_code=0, seconds=1.0)
    (finished,) = missing_events(run, late, PRINTS)
    assert (finished["stage"], finished["scheduler"]) == ("second", "TIMEOUT")


def test_a_new_submission_takes_back_the_end_of_the_one_before(run: RunDir) -> None:
    append_event(run.events, "finished", state="failed", stage="first", cause="x")
    assert missing_events(run, {"first": JobState("11", "TIMEOUT")}, PRINTS) == []
    append_event(run.events, "submitting", attempts={"first": 2, "second": 1})
    write_atomic(files.submission(run), files.attempts_text({"first": 2, "second": 1}))
    (finished,) = missing_events(run, {"first": JobState("13", "TIMEOUT")}, PRINTS)
    assert finished["scheduler"] == "TIMEOUT"


def test_what_sbatch_inherits() -> None:
    environ = {
        "PATH": "/bin",
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_JOB_ID": "1",  # of the allocation in which the user sits
        "SBATCH_TIMELIMIT": "1",  # would outdo the script's own lines
        "MY_LICENCE": "secret",
    }
    assert inherited(environ, ["MY_LICENCE"]) == {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf"}


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("WANDB_API_KEY", True),
        ("HF_TOKEN", True),
        ("HUGGING_FACE_HUB_TOKEN", True),
        ("NGC_API_KEY", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("db_password", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("PATH", False),
        ("KEYBOARD", False),
    ],
)
def test_names_that_are_taken_for_secrets(name: str, secret: bool) -> None:
    assert reads_like_a_secret(name) is secret


def test_a_placement_is_a_profile_again() -> None:
    fields: dict[str, Any] = {"nodes": 2, "nproc_per_node": 8, "account": "lab", "setup": ["x"], "secrets": ["A"]}
    profile = profile_of(probe_stage("first", placement=placement_of(**fields)))
    assert {name: getattr(profile, name) for name in fields} == fields
