"""What Slurm prints of jobs becomes one state a job: arrays, components, dependencies; and a list asks once."""

from __future__ import annotations

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.executors.slurm import control, files
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.executors.slurm.facts import difference
from nemotron_recipes.executors.slurm.states import (
    JobState,
    Unclear,
    agreed,
    combined,
    differs,
    merged,
    of_sacct,
    of_scontrol,
    of_squeue,
)
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import RunDir, append_event, read_jsonl
from nemotron_recipes.spec import JobHandle, to_json
from tests.helpers.cli import nemotron
from tests.helpers.executor_harness import placement
from tests.helpers.plans import plan_of, probe_stage


def test_parts_of_a_job() -> None:
    def of(*states: str) -> str:
        return combined([JobState("1", state) for state in states]).state

    assert of("COMPLETED", "PENDING", "RUNNING") == "RUNNING"
    assert of("COMPLETED", "PENDING") == "PENDING"
    assert of("COMPLETED", "TIMEOUT", "COMPLETED") == "TIMEOUT"
    assert of("COMPLETED", "COMPLETED") == "COMPLETED"


def test_a_state_that_nobody_knows_is_said_and_not_guessed() -> None:
    with pytest.raises(Unclear, match="'TELEPORTING'"):
        of_sacct("7|TELEPORTING|0:0|node1|00:01:00|None|Unknown")
    with pytest.raises(Unclear, match="'TELEPORTING'"):
        of_squeue("7|TELEPORTING|0|0|1:00|None|N/A|N/A|node1|")
    with pytest.raises(Unclear, match="'TELEPORTING'"):
        of_scontrol("7", "JobId=7 JobState=TELEPORTING Reason=None")


def ended(state: str, end: str, source: str) -> JobState:
    return JobState("7", state, end=end, told={source: state})


def test_how_a_job_ended_is_the_word_of_the_accounting() -> None:
    now = replace(ended("FAILED", "100", "slurmctld"), exit_code=137)
    both = agreed(now, replace(ended("OUT_OF_MEMORY", "100", "sacct"), exit_code=9, by="1000"))
    assert (both.state, differs(both)) == ("OUT_OF_MEMORY", True)
    assert (both.exit_code, both.by) == (137, "1000"), "sacct takes 128 away from what is greater"
    assert both.told == {"slurmctld": "FAILED", "sacct": "OUT_OF_MEMORY"}


def test_the_accounting_still_shows_how_the_attempt_before_ended() -> None:
    again = agreed(ended("COMPLETED", "200", "slurmctld"), ended("NODE_FAIL", "100", "sacct"))
    assert (again.state, differs(again)) == ("COMPLETED", True)
    waits = agreed(ended("PENDING", "N/A", "slurmctld"), ended("NODE_FAIL", "100", "sacct"))
    assert (waits.state, waits.active) == ("PENDING", True)


def test_an_end_that_the_accounting_has_not_heard_of() -> None:
    both = agreed(ended("FAILED", "100", "slurmctld"), ended("RUNNING", "Unknown", "sacct"))
    assert (both.state, differs(both)) == ("FAILED", True)
    assert merged({}, {"7": ended("FAILED", "100", "sacct")})["7"].state == "FAILED"


@pytest.mark.parametrize(
    ("now", "accounted", "ended", "words"),
    [
        ("RUNNING", "PENDING", "", "slurmctld says RUNNING of job 7, sacct says PENDING of job 7"),
        ("COMPLETING", "RUNNING", "succeeded", ""),
        ("COMPLETED", "COMPLETED", "succeeded", ""),
        ("FAILED", "FAILED", "failed", ""),
        ("CANCELLED", "CANCELLED", "cancelled", ""),
        ("CANCELLED", "CANCELLED", "ended", ""),
        (*("FAILED", "FAILED", "succeeded"), "sacct says FAILED of job 7, the run folder says succeeded of job 7"),
        (*("COMPLETED", "COMPLETED", "failed"), "sacct says COMPLETED of job 7, the run folder says failed of job 7"),
        (*("PENDING", "PENDING", "ended"), "sacct says PENDING of job 7, the run folder says ended of job 7"),
    ],
)
def test_where_the_sources_differ(now: str, accounted: str, ended: str, words: str) -> None:
    state = agreed(JobState("7", now, told={"slurmctld": now}), JobState("7", accounted, told={"sacct": accounted}))
    said = difference("first", state, ended)
    assert said.endswith(words)
    assert bool(said) == bool(words)


FAKE = """#!{python}
import pathlib, sys
with open({log!r}, "a") as log:
    log.write({name!r} + "\\n")
jobs = next(word for word in sys.argv if word.startswith("--jobs=")).partition("=")[2].split(",")
for job in jobs:
    state = pathlib.Path({folder!r}, job).read_text() if pathlib.Path({folder!r}, job).exists() else {other!r}
    if state:
        print({row!r}.format(job=job, state=state))
"""


class FakeSlurm:
    """squeue and sacct that print what they are told of each job, and count how often they are asked."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.log = tmp_path / "fake-slurm", tmp_path / "asked.txt"
        for name in ("bin", "squeue", "sacct"):
            (self.folder / name).mkdir(parents=True)
        self.serve("squeue", "{job}|{state}|0|0|1:00|None|N/A|N/A|node1|", "RUNNING")
        self.serve("sacct", "{job}|{state}|0:0|node1|00:01:00|None|Unknown", "RUNNING")
        monkeypatch.setenv("PATH", str(self.folder / "bin"))

    def serve(self, name: str, row: str, other: str) -> None:
        program = self.folder / "bin" / name
        fields = {"python": sys.executable, "log": str(self.log), "name": name, "folder": str(self.folder / name)}
        program.write_text(FAKE.format(**fields, row=row, other=other))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def says(self, source: str, job: str, state: str) -> None:
        (self.folder / source / job).write_text(state)

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().split()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    control._silent.clear()
    return FakeSlurm(tmp_path, monkeypatch)


def submitted_run(root: Path, name: str, *jobs: str) -> Path:
    """A run folder as a submission leaves it."""
    stages = [probe_stage(f"stage{number}", placement=placement(SlurmExecutor())) for number in range(len(jobs))]
    plan = plan_of(root / name, *stages)
    run = RunDir(Path(plan.run_dir))
    run.path.mkdir(parents=True)
    run.plan.write_text(to_json(plan))
    native = {"jobs": {s.name: job for s, job in zip(stages, jobs, strict=True)}, "names": {}}
    run.handle.write_text(to_json(JobHandle("slurm", plan.id, plan.run_dir, native)))
    write_atomic(files.submission(run), files.attempts_text({s.name: 1 for s in stages}))
    append_event(run.events, "submitting", attempts={s.name: 1 for s in stages})
    for stage, job in native["jobs"].items():
        append_event(run.events, "job-accepted", stage=stage, attempt=1, job=job)
    return run.path


def test_a_thousand_runs_are_one_question(fake: FakeSlurm, tmp_path: Path) -> None:
    first = submitted_run(tmp_path / "runs", "run", "1", "2")
    for number in range(1, 1000):
        _copy(first, tmp_path / "runs" / f"run-{number}", number)
    views = lifecycle.newest_runs(tmp_path / "runs", None)
    assert len(views) == 1000
    assert {view.state for view in views} == {"running"}
    assert fake.asked == ["squeue", "sacct"]


def _copy(run: Path, to: Path, number: int) -> None:
    to.mkdir()
    jobs = {f"stage{place}": str(10 * number + place) for place in range(2)}
    for name in ("plan.json", "handle.json", "events.jsonl"):
        text = (run / name).read_text().replace(str(run), str(to))
        if name == "handle.json":
            tree: dict[str, Any] = json.loads(text)
            text = json.dumps(tree | {"native": {"jobs": jobs, "names": {}}})
        (to / name).write_text(text)


def test_accounting_that_lags_is_not_believed_but_told(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.says("sacct", "1", "PENDING")
    submitted_run(tmp_path / "runs", "run", "1")
    (view,) = lifecycle.newest_runs(tmp_path / "runs", None)
    assert view.differences == ("stage0: slurmctld says RUNNING of job 1, sacct says PENDING of job 1",)


def test_what_slurmctld_has_forgotten_the_accounting_tells(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.says("squeue", "1", "")
    fake.says("sacct", "1", "TIMEOUT")
    run = submitted_run(tmp_path / "runs", "run", "1")
    (view,) = lifecycle.newest_runs(tmp_path / "runs", None)
    assert view.state == "failed"
    assert "time limit" in view.explanation
    assert [e["scheduler"] for e in read_jsonl(RunDir(run).events) if e["event"] == "finished"] == ["TIMEOUT"]
    fake.log.unlink()
    lifecycle.newest_runs(tmp_path / "runs", None)
    assert not fake.log.exists(), "the end is recorded: nobody has to be asked"


def test_without_accounting_squeue_alone_tells(fake: FakeSlurm, tmp_path: Path) -> None:
    (fake.folder / "bin" / "sacct").write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2; exit 1\n")
    fake.says("squeue", "2", "PENDING")
    submitted_run(tmp_path / "runs", "one", "1")
    submitted_run(tmp_path / "runs", "two", "2")
    views = lifecycle.newest_runs(tmp_path / "runs", None)
    assert sorted((Path(view.path).name, view.state) for view in views) == [("one", "running"), ("two", "pending")]
    assert [view.differences for view in views] == [(), ()]


def test_where_slurm_is_not_there_the_run_folder_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = submitted_run(tmp_path / "runs", "run", "1")
    append_event(RunDir(path).events, "stage-started", stage="stage0", attempt=1, pid=1, job="1", hosts=["node1"])
    (view,) = lifecycle.newest_runs(tmp_path / "runs", None)
    assert view.state == "running"
    assert "this is what the run folder says" in view.differences[0]


def test_a_submission_that_nobody_can_tell_of_is_shown_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = submitted_run(tmp_path / "nemotron-output" / "runs", "run")
    run = RunDir(folder)
    stage = probe_stage("stage0", placement=placement(SlurmExecutor()))
    plan = plan_of(folder, stage)
    run.plan.write_text(to_json(plan))
    native = {"jobs": {}, "names": {"stage0": "a-job"}, "tokens": {"stage0": "nemotron=a-token"}}
    run.handle.write_text(to_json(JobHandle("slurm", plan.id, plan.run_dir, native)))
    answer = files.answer(run.stage("stage0"), "nemotron=a-token")
    answer.parent.mkdir(parents=True)
    answer.with_name(f"{answer.name}.out").touch()  # sbatch began, and has said nothing
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue that could be asked
    shown = json.loads(nemotron(tmp_path, "runs", "show", folder.name, "--json", code=1))
    assert "not known whether Slurm has accepted stage0" in shown["differences"][0]
    assert "not known whether" in nemotron(tmp_path, "runs", "show", folder.name, code=1)
    run.handle.write_text(to_json(JobHandle("slurm", plan.id, plan.run_dir, {**native, "jobs": {"stage0": "1"}})))
    nemotron(tmp_path, "runs", "show", folder.name)
