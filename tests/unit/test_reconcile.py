"""What became of a stage: the whole table, then run folders as executors and workers leave them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.owner import this_process
from nemotron_recipes.artifacts.reconcile import Evidence, exit_text, judge
from nemotron_recipes.artifacts.records import find_run, load_run, load_runs, run_folders
from nemotron_recipes.errors import UserError
from nemotron_recipes.rundir import RunDir, append_event, write_record
from nemotron_recipes.spec import JobHandle

FAILURE = {"rank": 3}


def record(state: str) -> dict[str, Any]:
    return {"state": state, "attempt": 1}


TABLE = [
    # evidence, state, a part of the note
    ({"reused": True}, "reused", ""),
    ({}, "pending", ""),
    ({"liveness": "running"}, "pending", ""),
    ({"cancelled": True, "liveness": "ended"}, "cancelled", ""),
    # it ended with exit code 0
    ({"started": True, "exit_code": 0, "record": record("succeeded")}, "succeeded", ""),
    ({"started": True, "exit_code": 0, "record": record("failed")}, "failed", "record says failed"),
    ({"started": True, "exit_code": 0, "record": record("cancelled")}, "cancelled", "record says cancelled"),
    ({"started": True, "exit_code": 0}, "failed", "recorded no end"),
    # it ended with another exit code: never succeeded
    ({"started": True, "exit_code": 1, "record": record("succeeded")}, "failed", "record says succeeded"),
    ({"started": True, "exit_code": 1, "record": record("failed")}, "failed", ""),
    ({"started": True, "exit_code": 1, "record": record("cancelled")}, "failed", "nobody cancelled"),
    ({"started": True, "exit_code": 130, "record": record("cancelled")}, "cancelled", "130"),
    ({"started": True, "exit_code": 137}, "failed", "SIGKILL"),
    ({"started": True, "exit_code": 1, "record": record("cancelled"), "cancelled": True}, "cancelled", ""),
    ({"started": True, "exit_code": 137, "cancelled": True}, "cancelled", ""),
    ({"started": True, "exit_code": 1, "record": record("succeeded"), "cancelled": True}, "cancelled", "succeeded"),
    # nobody wrote an exit code
    ({"started": True, "record": record("succeeded"), "liveness": "lost"}, "succeeded", ""),
    ({"started": True, "record": record("succeeded"), "failure": FAILURE}, "failed", "rank 3 failed"),
    ({"started": True, "record": record("failed"), "liveness": "lost"}, "failed", ""),
    ({"started": True, "liveness": "running"}, "running", ""),
    ({"started": True, "liveness": "queued"}, "running", ""),
    ({"started": True, "liveness": "running", "failure": FAILURE}, "running", "rank 3 has failed"),
    ({"started": True, "liveness": "lost"}, "lost", "nobody"),
    ({"started": True, "liveness": "lost", "failure": FAILURE}, "failed", "recorded no end"),
    ({"started": True, "liveness": "lost", "cancelled": True}, "cancelled", ""),
    ({"started": True, "liveness": "ended"}, "failed", "launcher ended"),
    # started by hand
    ({"started": True, "launched": False, "worker": "alive"}, "running", ""),
    ({"started": True, "launched": False, "worker": "alive", "liveness": "ended"}, "running", ""),
    ({"started": True, "launched": False, "worker": "gone"}, "lost", "nobody"),
    ({"started": True, "launched": False, "worker": "gone", "failure": FAILURE}, "failed", "no end"),
    ({"started": True, "launched": False, "worker": "unknown"}, "running", "by hand"),
    ({"started": True, "launched": False, "worker": "unknown", "liveness": "running"}, "running", ""),
    ({"started": True, "launched": False, "worker": "unknown", "liveness": "lost"}, "lost", "nobody"),
    # a newer launcher will come to it
    ({"started": True, "exit_code": 1, "retrying": True, "liveness": "running"}, "pending", "last attempt: failed"),
    ({"started": True, "exit_code": 0, "record": record("succeeded"), "retrying": True}, "succeeded", ""),
]


@pytest.mark.parametrize(("evidence", "state", "note"), TABLE)
def test_table(evidence: dict[str, Any], state: str, note: str) -> None:
    judged, said = judge(Evidence(**evidence))
    assert judged == state
    assert note in said if note else said == ""


@pytest.mark.parametrize("code", [1, 2, 137, 143])
@pytest.mark.parametrize("said", [None, "succeeded", "failed", "cancelled"])
@pytest.mark.parametrize("cancelled", [True, False])
@pytest.mark.parametrize("liveness", [None, "queued", "running", "ended", "lost"])
def test_a_bad_exit_code_is_never_a_success(code: int, said: str | None, cancelled: bool, liveness: Any) -> None:
    evidence = Evidence(
        started=True, exit_code=code, record=record(said) if said else None, cancelled=cancelled, liveness=liveness
    )
    assert judge(evidence)[0] in ("failed", "cancelled")


def test_exit_codes_for_people() -> None:
    assert exit_text(1) == "exit code 1"
    assert exit_text(143) == "exit code 143 (SIGTERM)"
    assert "out-of-memory" in exit_text(137)
    assert exit_text(255) == "exit code 255"


class Run:
    """A run folder of two stages, written step by step as the launcher and the workers write it."""

    def __init__(self, root: Path, run_id: str = "nano3-pipe-1", created: str = "2026-01-01T00:00:00+00:00"):
        self.dir = RunDir(root / run_id)
        self.dir.path.mkdir(parents=True)
        stages = [{"name": name, "fingerprint": f"f-{name}", "reused": None} for name in ("prep", "sft")]
        self.plan = {"id": run_id, "title": "nano3 pipe", "created": created, "stages": stages}
        self.write()
        handle = {"executor": "local", "run": run_id, "run_dir": str(self.dir.path), "native": {}}
        self.dir.handle.write_text(json.dumps(handle))

    def write(self) -> None:
        self.dir.plan.write_text(json.dumps(self.plan))

    def launcher(self, event: str, **fields: Any) -> None:
        append_event(self.dir.events, event, **fields)

    def worker(self, stage: str, attempt: int = 1, rank: int = 0, event: str = "started", **fields: Any) -> None:
        append_event(self.dir.stage(stage).events(attempt, rank), event, **fields)

    def log(self, stage: str, text: str, attempt: int = 1, rank: int = 0) -> None:
        path = self.dir.stage(stage).log(attempt, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def record(self, stage: str, state: str, attempt: int = 1) -> None:
        folder = self.dir.stage(stage)
        folder.path.mkdir(exist_ok=True)
        write_record(folder, {"state": state, "attempt": attempt, "started": 1.0, "ended": 2.0, "results": {"loss": 1}})

    def fail(self, stage: str, rank: int, time: float, message: str, attempt: int = 1) -> None:
        path = self.dir.stage(stage).failure(attempt, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        failure = {"time": time, "rank": rank, "host": "h", "message": message, "exit_code": 1, "lines": ["a", message]}
        path.write_text(json.dumps(failure))

    def states(self, alive: Any = "running") -> list[str]:
        view = load_run(self.dir.path, lambda handle: alive)
        return [view.state, *(stage.state for stage in view.stages)]


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.states("queued") == ["pending", "pending", "pending"]
    run.launcher("driver-started", pid=1)
    assert run.states() == ["running", "pending", "pending"]
    run.launcher("stage-started", stage="prep", attempt=1, pid=2)
    assert run.states() == ["running", "running", "pending"]
    run.record("prep", "succeeded")
    run.launcher("stage-exited", stage="prep", attempt=1, exit_code=0, seconds=1)
    assert run.states() == ["running", "succeeded", "pending"]
    run.launcher("stage-started", stage="sft", attempt=1, pid=3)
    run.record("sft", "succeeded")
    run.launcher("stage-exited", stage="sft", attempt=1, exit_code=0, seconds=1)
    run.launcher("finished", state="succeeded")
    assert run.states() == ["succeeded", "succeeded", "succeeded"]


def test_the_executor_is_not_asked_about_a_run_whose_end_is_recorded(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.launcher("driver-started", pid=1)
    run.launcher("finished", state="failed", stage=None, cause="no disk")

    def ask(handle: JobHandle) -> Any:
        raise AssertionError

    view = load_run(run.dir.path, ask)
    assert (view.state, view.explanation) == ("failed", "no disk")


def test_the_worker_never_ran(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.launcher("driver-started", pid=1)
    run.launcher("stage-started", stage="prep", attempt=1, pid=2)
    path = run.dir.stage("prep").launcher_log(1)
    path.parent.mkdir(parents=True)
    path.write_text("python: not found\x1b[31m\n")
    run.launcher("stage-exited", stage="prep", attempt=1, exit_code=127, seconds=0)
    run.launcher("finished", state="failed", stage="prep", cause="exit code 127")
    view = load_run(run.dir.path)
    assert (view.state, view.stages[0].state, view.stages[1].state) == ("failed", "failed", "pending")
    explanation = view.stages[0].explanation
    assert "exit code 127" in explanation and "python: not found\\x1b[31m" in explanation and str(path) in explanation


def test_a_worker_that_was_killed_before_it_could_write(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.launcher("driver-started", pid=1)
    run.launcher("stage-started", stage="prep", attempt=1, pid=2)
    for rank in (0, 1):
        run.worker("prep", rank=rank)
    run.worker("prep", rank=0, event="cancelled")
    run.log("prep", "step 5\rstep 6\nallocating\n", rank=1)
    run.launcher("stage-exited", stage="prep", attempt=1, exit_code=1, seconds=0)
    stage = load_run(run.dir.path, lambda handle: "ended").stages[0]
    assert stage.state == "failed"
    assert "rank 1 ended without a word" in stage.explanation and "| allocating" in stage.explanation
    assert stage.log and stage.log.endswith("rank-1.log")


def test_the_rank_that_failed_first_explains(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.launcher("stage-started", stage="prep", attempt=1, pid=2)
    run.fail("prep", 0, 20.0, "connection reset")
    run.fail("prep", 1, 10.0, "CUDA out of memory")
    run.record("prep", "failed")
    run.launcher("stage-exited", stage="prep", attempt=1, exit_code=1, seconds=0)
    stage = load_run(run.dir.path).stages[0]
    assert "rank 1 on h failed first: CUDA out of memory" in stage.explanation
    assert "connection reset" not in stage.explanation and stage.log and stage.log.endswith("rank-1.log")


def test_both_launcher_and_worker_were_killed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.launcher("driver-started", pid=1)
    run.launcher("stage-started", stage="prep", attempt=1, pid=2)
    run.worker("prep")
    assert run.states("lost") == ["lost", "lost", "pending"]


def test_an_older_attempt_says_nothing_about_a_newer_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.launcher("driver-started", pid=1)
    run.launcher("stage-started", stage="prep", attempt=1, pid=2)
    run.record("prep", "failed")
    run.fail("prep", 0, 1.0, "boom")
    run.launcher("stage-exited", stage="prep", attempt=1, exit_code=1, seconds=0)
    run.launcher("finished", state="failed", stage="prep", cause="exit code 1")
    assert run.states() == ["failed", "failed", "pending"]
    run.launcher("driver-started", pid=5)
    assert run.states() == ["running", "pending", "pending"]
    assert run.states("lost") == ["failed", "failed", "pending"]
    run.launcher("stage-started", stage="prep", attempt=2, pid=6)
    assert run.states() == ["running", "running", "pending"]
    run.record("prep", "succeeded", attempt=2)
    run.launcher("stage-exited", stage="prep", attempt=2, exit_code=0, seconds=0)
    view = load_run(run.dir.path, lambda handle: "running")
    assert (view.stages[0].state, view.stages[0].attempt, view.stages[0].explanation) == ("succeeded", 2, "")


def test_cancelled_runs(tmp_path: Path) -> None:
    run = Run(tmp_path, "a")
    run.launcher("driver-started", pid=1)
    run.launcher("stage-started", stage="prep", attempt=1, pid=2)
    run.launcher("stage-exited", stage="prep", attempt=1, exit_code=143, seconds=0)
    run.launcher("cancelled", stage="prep", attempt=1)
    assert run.states() == ["cancelled", "cancelled", "pending"]
    killed = Run(tmp_path, "b")
    killed.launcher("driver-started", pid=1)
    killed.launcher("stage-started", stage="prep", attempt=1, pid=2)
    killed.launcher("cancelled", stage=None, attempt=None)
    assert killed.states()[:2] == ["cancelled", "cancelled"]


def test_a_stage_started_by_hand(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.dir.handle.unlink()
    run.worker("prep", **this_process())
    assert run.states() == ["running", "running", "pending"]
    run.worker("prep", **{**this_process(), "start": "0"})
    assert run.states() == ["lost", "lost", "pending"]


def test_reused_stages(tmp_path: Path) -> None:
    run = Run(tmp_path)
    made = {"name": "rows", "version": 3, "digest": "sha256:1", "uri": "/s", "producer": {"slot": "data"}}
    for stage in run.plan["stages"]:  # type: ignore[attr-defined]
        stage["reused"] = made
    run.write()
    assert run.states() == ["succeeded", "reused", "reused"]
    assert load_run(run.dir.path).stages[0].outputs["data"]["version"] == 3


def test_a_run_that_was_never_submitted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.dir.handle.unlink()
    view = load_run(run.dir.path, lambda handle: "running")
    assert view.state == "pending" and "never submitted" in view.explanation


def test_runs_are_listed_newest_first_also_a_damaged_one(tmp_path: Path) -> None:
    Run(tmp_path, "old", "2026-01-01T00:00:00+00:00")
    Run(tmp_path, "new", "2026-02-01T00:00:00+00:00")
    broken = Run(tmp_path, "broken")
    broken.dir.plan.write_text("{")
    (tmp_path / "not a run").mkdir()
    views = load_runs(run_folders(tmp_path))
    assert [view.id for view in views] == ["new", "old", "broken"]
    assert "plan.json is damaged" in views[-1].explanation
    assert load_runs(run_folders(tmp_path / "nowhere")) == []
    os.utime(tmp_path / "old" / "plan.json", (1, 1))
    os.utime(tmp_path / "broken" / "plan.json", (2, 2))
    assert [view.id for view in load_runs(run_folders(tmp_path, 2))] == ["new", "broken"]


def test_runs_are_found_by_a_unique_part_of_their_name(tmp_path: Path) -> None:
    for name in ("nano3-sft-1", "nano3-sft-12", "nano3-rl-3"):
        Run(tmp_path, name)
    assert find_run(tmp_path, "nano3-sft-1").name == "nano3-sft-1"
    assert find_run(tmp_path, "rl").name == "nano3-rl-3"
    with pytest.raises(UserError, match="any of nano3-sft-1, nano3-sft-12"):
        find_run(tmp_path, "sft")
    with pytest.raises(UserError, match="did you mean 'nano3-rl-3'"):
        find_run(tmp_path, "nano3-rl-4")
    with pytest.raises(UserError, match="no runs there yet"):
        find_run(tmp_path / "nowhere", "x")
    with pytest.raises(UserError):
        find_run(tmp_path, "")
    with pytest.raises(UserError):
        load_run(tmp_path / "nowhere")
