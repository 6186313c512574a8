"""What a submission leaves when the connection goes at its end. With real jobs: tests/slurm/test_cut_submissions.py."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.cli import plan_text
from nemotron_recipes.executors.remote import sites, there, transport
from nemotron_recipes.executors.remote.ssh import Remote
from nemotron_recipes.executors.remote.ssh_login import Login
from nemotron_recipes.executors.remote.ssh_session import Connection
from nemotron_recipes.executors.slurm import chain, control, handles, script, submission
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.executors.slurm.states import JobState
from nemotron_recipes.rundir import RunDir, append_event, read_json, read_jsonl, write_sealed
from nemotron_recipes.spec import JobHandle
from tests.helpers.plans import plan_of, probe_stage
from tests.unit.test_slurm_render import placement_of

STAGES = ("first", "second")


class FakeLink(Remote):
    """A connection to a folder of this machine, which goes at a call and may come back."""

    def __init__(self, folder: Path):
        self.run, self.away = RunDir(folder / "near" / "run"), False
        super().__init__(Connection(Login("cluster")), self.run.path, str(folder / "far" / "run"))

    def call(self, function: Any, *args: Any) -> Any:
        self.away = self.away or self.goes_at(function, args)
        if self.away:
            raise transport.Unreachable("the connection was lost")
        return function(*args)

    def goes_at(self, function: Any, args: tuple[Any, ...]) -> bool:
        return False

    def accepted(self) -> list[str]:
        events = read_jsonl(Path(self.far(self.run.events)))
        return [event["stage"] for event in events if event["event"] == "job-accepted"]


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLink:
    """Slurm takes each job, and knows nothing of it."""
    found = FakeLink(tmp_path)
    numbers = iter(range(1, 100))
    monkeypatch.setattr(submission, "submit", lambda *_: str(next(numbers)))
    monkeypatch.setattr(control, "job_state", lambda _: None)
    monkeypatch.setattr(sites, "of_handle", lambda _: found)
    return found


def submitted(link: FakeLink) -> JobHandle:
    plan = plan_of(Path(link.far(link.run.path)), *(probe_stage(name, placement=placement_of()) for name in STAGES))
    executor = SlurmExecutor()
    with transport.through(link):
        return executor.submit(plan, executor.render(plan))


def goes_at_the_last_handle(function: Any, args: tuple[Any, ...]) -> bool:
    return function is there.write_document and args[1]["native"]["jobs"].keys() == {*STAGES}


def goes_at_the_second_event(function: Any, args: tuple[Any, ...]) -> bool:
    return function is there.event and args[1] == "job-accepted" and args[2]["stage"] == "second"


@pytest.mark.parametrize("goes_at", [goes_at_the_last_handle, goes_at_the_second_event])
def test_a_connection_that_goes_after_the_last_job_fails_nothing(link: FakeLink, goes_at: Any) -> None:
    link.goes_at = goes_at  # type: ignore[method-assign]
    handle = submitted(link)
    assert handle.native["jobs"] == {"first": "1", "second": "2"}
    said = plan_text.note(handle)
    assert said.startswith("note: ") and handle.run in said and "in the queue" in said
    kept = JobHandle(**(read_json(link.run.handle) or {}))
    assert kept.native["jobs"] == handle.native["jobs"] and "note" not in kept.native

    assert handles.recovered(kept) == kept, "still away: nothing else is wrong with it"
    link.away, link.goes_at = False, lambda *_: False  # type: ignore[method-assign]
    link.refresh()  # as every command does that looks at a run
    for _ in range(2):
        assert handles.recovered(kept) == kept
        assert link.accepted() == [*STAGES], "whoever looks next makes up for it, once"
        assert list(read_jsonl(link.run.events)) == list(read_jsonl(Path(link.far(link.run.events))))
    far = read_json(Path(link.far(link.run.handle))) or {}
    assert far["native"]["jobs"] == handle.native["jobs"]


def test_a_submission_that_nothing_disturbs_leaves_no_note(link: FakeLink) -> None:
    handle = submitted(link)
    assert plan_text.note(handle) == "" and link.accepted() == [*STAGES]


def test_a_submission_that_just_goes_on_is_left_alone(link: FakeLink) -> None:
    link.goes_at = goes_at_the_second_event  # type: ignore[method-assign]
    handle = submitted(link)
    link.away, link.goes_at = False, lambda *_: False  # type: ignore[method-assign]
    link.refresh()
    with handles.alone(link.run):
        handles.recovered(handle)
    assert link.accepted() == ["first"]


@pytest.mark.parametrize(("end", "seconds"), [("exit 0", 60.0), ("exec sleep 600", 0.3)])
def test_how_long_sbatch_is_quiet_counts_from_its_end(tmp_path: Path, end: str, seconds: float) -> None:
    """It may have talked to slurmctld for minutes."""
    answer = tmp_path / "answer"
    there.submit(["sh", "-c", f"touch -d @1 {answer}.out {answer}.err; {end}"], seconds, str(tmp_path), str(answer), [])
    assert there.answered(str(answer))["quiet"] < 600


def test_an_sbatch_that_nobody_waited_for_is_quiet_since_its_last_word(tmp_path: Path) -> None:
    for name, stamp in (("answer.out", 1), ("answer.err", time.time())):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (stamp, stamp))
    assert there.answered(str(tmp_path / "answer"))["quiet"] < 600


@pytest.mark.parametrize(
    ("config", "quiet", "settled"),
    [
        ("", 29.0, False),
        ("", 31.0, True),
        ("MessageTimeout          = 10 sec\n", 29.0, False),
        ("KillWait = 30 sec\nMessageTimeout          = 100 sec\n", 99.0, False),
        ("KillWait = 30 sec\nMessageTimeout          = 100 sec\n", 101.0, True),
    ],
)
def test_slurm_has_as_long_as_its_own_time_out_to_take_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, quiet: float, settled: bool
) -> None:
    said = {"begun": True, "alive": False, "out": "", "err": "", "quiet": quiet}
    monkeypatch.setattr(control, "ask", lambda *_: config)
    monkeypatch.setattr(control, "job_with", lambda *_: None)
    monkeypatch.setattr(there, "answered", lambda _: said)
    if settled:
        assert submission.found(tmp_path / "answer", "token", "name", ()) is None
    else:
        with pytest.raises(submission.Unknown, match="ended without an answer"):
            submission.found(tmp_path / "answer", "token", "name", ())


def test_jobs_of_the_handle_before_are_no_jobs_of_this_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: FakeLink
) -> None:
    """A site that drops comments leaves the name alone to tell them apart; and no event tells of job 7."""
    native = {"jobs": {"first": "7"}, "names": {}, "tokens": {"first": "a"}, "earlier": ["5"]}
    write_sealed(link.run.handle, asdict(JobHandle("slurm", "run", str(link.run.path), native)))
    append_event(link.run.events, "job-accepted", stage="first", attempt=1, job="6")
    given: list[Any] = []
    monkeypatch.setattr(submission, "submit", lambda *args: given.append(args) or str(10 + len(given)))
    handle = submitted(link)
    assert [set(args[-1]) for args in given] == [{"5", "6", "7"}] * 2
    monkeypatch.setattr(control, "_question", lambda argv, *_: "7|\n" if argv[0] == "squeue" else "5|\n6|\n")
    said = {"begun": True, "alive": False, "out": "", "err": "", "quiet": 1e9}
    monkeypatch.setattr(link, "call", lambda *_: said)
    with transport.through(link):
        assert handles.find(handle, "first") is None


BROKEN = "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received"


@pytest.mark.parametrize("end", ["kill -9 $$", "exit 137", f"echo '{BROKEN}' >&2; exit 1"])
def test_an_sbatch_that_did_not_come_to_its_own_end_may_have_been_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A machine out of memory kills it, slurmctld is restarted: the job may be there, and Slurm is asked for it."""
    known: list[str | None] = ["7", "7", None]
    monkeypatch.setattr(control, "job_with", lambda *_: known.pop(0))
    monkeypatch.setattr(control, "ask", lambda *_: "")
    answer = tmp_path / "answer"
    given = (["sh", "-c", end], str(tmp_path), [], answer, "token", "name", ())
    assert submission.submit(*given) == "7"
    assert submission.found(answer, "token", "name", ()) == "7", "and whoever looks later finds it as well"
    with pytest.raises(submission.Unknown, match="ended without an answer"):
        submission.found(answer, "token", "name", ())


def test_what_sbatch_refuses_nobody_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "job_with", lambda *_: "7")
    answer = tmp_path / "answer"
    refusal = ["sh", "-c", "echo 'sbatch: error: Invalid partition' >&2; exit 1"]
    with pytest.raises(control.Refused, match="Invalid partition"):
        submission.submit(refusal, str(tmp_path), [], answer, "token", "name", ())
    assert submission.found(answer, "token", "name", ()) is None
    assert there.forestall(str(tmp_path / "other"))
    assert submission.found(tmp_path / "other", "token", "name", ()) is None


def test_a_run_waits_for_the_last_job_of_the_one_before_whatever_its_stages_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handle's file has its stages by name; the jobs of a pipe go by their order."""
    other = RunDir(tmp_path / "other")
    jobs = {"sft": "99", "dpo": "100", "eval": "101"}
    write_sealed(other.handle, asdict(JobHandle("slurm", "other", str(other.path), {"jobs": jobs, "names": jobs})))
    monkeypatch.setattr(control, "job_state", lambda job: JobState(job, "PENDING"))
    plan = plan_of(tmp_path / "run", probe_stage("first", placement=placement_of()))
    plan = replace(plan, after=str(other.path))
    assert chain._before(plan, RunDir(tmp_path / "run")) == {script.last_of(str(other.path)): "101"}
