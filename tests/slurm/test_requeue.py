"""Back into the queue and on: time limit, SIGTERM, dead node; on a real Slurm, with workers that know nothing of ours
but the contract in docs/slurm.md, and once with real training."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.records import RunView, load_run
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.rundir import read_json
from nemotron_recipes.spec import JobHandle, Launch
from tests.helpers import slurm
from tests.helpers.executor_harness import events, placement, wait_for, wait_until_over
from tests.helpers.plans import ROOT, plan_of, probe_stage, submit
from tests.helpers.training import events as worker_events
from tests.helpers.training import finish, losses, prepared, start, worker_file

pytestmark = pytest.mark.slurm

EXECUTOR = SlurmExecutor()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def cluster(slurm_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    return _use(slurm_cluster, monkeypatch)


def test_a_worker_that_is_not_done_goes_back_and_finishes(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """Exit code 75, twice; what depends on it waits."""
    place = placement(EXECUTOR, max_requeues=2)
    first = probe_stage("first", placement=place, exit=75, record=None, attempts=2)
    plan = plan_of(tmp_path / "it's $HOME" / "run", first, probe_stage("second", placement=place))
    handle, _ = submit(EXECUTOR, plan)
    seen: set[str] = set()
    while EXECUTOR.liveness(handle) in ("queued", "running"):
        seen.add(_view(handle).state)
        seen.add(_view(handle).stage("first").state)
        time.sleep(0.1)
    assert seen <= {"pending", "running", "succeeded"}, "never failed, never lost in between"
    told = events(handle, "requeued")
    assert [(e["stage"], e["attempt"], e["requeues"], e["cause"]) for e in told] == [
        ("first", 1, 1, "time-limit"),
        ("first", 2, 2, "time-limit"),
    ]
    view = _view(handle)
    assert (view.state, view.stage("first").attempt, view.stage("second").attempt) == ("succeeded", 3, 1)
    assert [e["exit_code"] for e in events(handle, "stage-exited")] == [75, 75, 0, 0]
    (log,) = (Path(handle.run_dir) / "first" / "logs").glob("slurm-*.out")
    assert log.read_text().count("job exited with code") == 3, "no attempt wipes out what the one before said"


def test_requeues_come_to_an_end(cluster: slurm.Cluster, tmp_path: Path) -> None:
    place = placement(EXECUTOR, max_requeues=1)
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place, exit=75, record=None)))
    assert wait_until_over(EXECUTOR, handle) == "ended"
    view = _view(handle)
    assert (view.state, view.stage("first").attempt, len(events(handle, "requeued"))) == ("failed", 2, 1)
    assert "all 1 requeues are used" in view.explanation
    assert cluster.wait(handle.native["jobs"]["first"])["JobState"] == "FAILED"


@pytest.mark.parametrize("orders", [{"exit": 7}, {"signal": 9}, {"exit": 1}])
def test_a_failure_of_the_code_does_not_go_back(cluster: slurm.Cluster, tmp_path: Path, orders: dict[str, int]) -> None:
    place = placement(EXECUTOR, max_requeues=3)
    stage = probe_stage("first", placement=place, record=None, **orders)  # type: ignore[arg-type]
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage))
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert (_view(handle).state, events(handle, "requeued")) == ("failed", [])
    assert cluster.wait(handle.native["jobs"]["first"])["Restarts"] == "0"


@pytest.mark.long
def test_a_worker_that_does_not_look_at_the_clock_is_told(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """The deadline is the allocation's real end less the margin; then comes SIGTERM."""
    place = placement(EXECUTOR, max_requeues=1, time="5", save_margin=296.0)
    handle, _ = submit(
        EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place, sleep=100, attempts=1))
    )
    received = wait_for(lambda: _received(tmp_path, "first"))
    job = cluster.job(handle.native["jobs"]["first"])
    end = time.mktime(time.strptime(job["EndTime"], "%Y-%m-%dT%H:%M:%S"))
    assert float(received["deadline"]) == pytest.approx(end - 296, abs=1)
    assert wait_until_over(EXECUTOR, handle) == "ended"
    (told,) = events(handle, "requeued")
    assert told["cause"] == "time-limit"
    assert _view(handle).state == "succeeded"


def test_a_signal_from_slurm_puts_it_back_but_scancel_ends_it(cluster: slurm.Cluster, tmp_path: Path) -> None:
    place = placement(EXECUTOR, max_requeues=2, nodes=2)
    stage = probe_stage("first", placement=place, launcher="torchrun", sleep=100)
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage))
    job = handle.native["jobs"]["first"]
    wait_for(lambda: _received(tmp_path, "first", 1) and _received(tmp_path, "first", 0))
    cluster.run("scancel", "--signal=TERM", job)
    wait_for(lambda: _received(tmp_path, "first", 1).get("attempt") == 2)
    assert [e["cause"] for e in events(handle, "requeued")] == ["signal"]
    assert _view(handle).state == "running"
    cluster.run("scancel", job)
    assert wait_until_over(EXECUTOR, handle) == "ended"
    view = _view(handle)
    assert (view.state, view.stage("first").attempt, len(events(handle, "requeued"))) == ("cancelled", 2, 1)


def test_an_operator_who_puts_it_back(cluster: slurm.Cluster, tmp_path: Path) -> None:
    place = placement(EXECUTOR, max_requeues=1)
    handle, _ = submit(
        EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place, sleep=100, attempts=1))
    )
    wait_for(lambda: _received(tmp_path, "first"))
    cluster.run("scontrol", "requeue", handle.native["jobs"]["first"])
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert [(e["attempt"], e["cause"]) for e in events(handle, "requeued")] == [(1, "scheduler")]
    assert _view(handle).state == "succeeded"


@pytest.mark.long
@pytest.mark.e2e
def test_training_in_several_short_limits_is_training_in_one(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """Two ranks on two nodes, against an undisturbed run of two. The limit follows from how long that one took."""
    data = prepared(tmp_path / "data", "sft", train=200)
    sections: dict[str, Any] = {"evaluation": {"rows": 0}, "checkpoint": {"save_interval": 1000, "keep": 2}}
    sections["train"] = {"train_iters": 60, "global_batch_size": 32, "micro_batch_size": 4}
    reference = worker_file(tmp_path / "reference" / "sft", data, nproc=2, **sections)
    began = time.time()
    assert finish(start(reference, nproc=2)) == 0
    told = {event["event"]: event for event in worker_events(tmp_path / "reference" / "sft")}
    window = 1.3 * (told["ready"]["time"] - began) + told["trained"]["seconds"] / 3

    path = worker_file(tmp_path / "run" / "sft", data, nproc=2, **sections)
    place = placement(EXECUTOR, nodes=2, time="5", save_margin=300 - window, max_requeues=8)
    launch = Launch("nemotron_recipes.worker", ("--config", str(path)), {"train.yaml": path.read_text()}, "torchrun")
    plan = plan_of(tmp_path / "run", replace(probe_stage("sft", placement=place), launch=launch))
    handle, _ = submit(EXECUTOR, plan)
    assert wait_until_over(EXECUTOR, handle, 400) == "ended"
    assert _view(handle).state == "succeeded"
    told_of = events(handle, "requeued")
    assert {event["cause"] for event in told_of} == {"time-limit"}
    steps = []
    for event in told_of:
        said = {entry["event"]: entry for entry in worker_events(tmp_path / "run" / "sft", event["attempt"])}
        if "stopped" in said:  # else its time was up before the first step, or after the last one
            assert (said["stopped"]["reason"], said["stopped"]["step"]) == ("time-limit", event["step"])
            in_time = said["ready"]["time"] < said["ready"]["deadline"] - 2  # else it took the one step all the same
            assert not in_time or said["checkpoint-saved"]["time"] <= said["ready"]["deadline"] + 1
            assert said["unfinished"]["exit_code"] == 75
            steps.append(event["step"])
    assert len(steps) >= 2
    assert steps == sorted(set(steps)), "each attempt came further"
    assert losses(tmp_path / "run" / "sft") == pytest.approx(losses(tmp_path / "reference" / "sft"), rel=1e-6)
    assert len(losses(tmp_path / "run" / "sft")) == 60


@pytest.mark.long
def test_a_dead_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.require()
    with slurm.cluster("--nodes=3", "--account=lab") as cluster:
        _use(cluster, monkeypatch)
        place = placement(EXECUTOR, nodes=2, max_requeues=1)
        stage = probe_stage("first", placement=place, launcher="torchrun", sleep=300, attempts=1)
        handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage))
        wait_for(lambda: _received(tmp_path, "first", 1) and _received(tmp_path, "first", 0))
        slurm.manage("kill-node", "2", folder=cluster.folder)
        assert wait_until_over(EXECUTOR, handle, 180) == "ended"
        assert [(e["attempt"], e["cause"]) for e in events(handle, "requeued")] == [(1, "node-failure")]
        view = _view(handle)
        assert (view.state, view.stage("first").attempt) == ("succeeded", 2)


@pytest.mark.long
@pytest.mark.parametrize("grace", [0, 30])
def test_preemption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace: int) -> None:
    """With time to save Slurm sends SIGTERM first; without, its database alone says why."""
    slurm.require()
    preempting = ("--set", "PreemptType=preempt/partition_prio", "--set", "PreemptMode=REQUEUE")
    with slurm.cluster("--nodes=1", "--account=lab", *preempting) as cluster:
        _use(cluster, monkeypatch)
        cluster.run("scontrol", "update", "PartitionName=interactive", "PriorityTier=10")
        cluster.run("scontrol", "update", "PartitionName=batch", f"GraceTime={grace}")
        place = placement(EXECUTOR, max_requeues=1, partition="batch", exclusive=True)
        stage = probe_stage("first", placement=place, sleep=300, attempts=1)
        handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage))
        wait_for(lambda: _received(tmp_path, "first"))
        flags = ("--partition=interactive", "--exclusive", "--account=lab", "--time=1")
        urgent = cluster.sbatch("sleep 3", *flags, cwd=tmp_path)
        assert cluster.wait(urgent)["JobState"] == "COMPLETED"
        assert wait_until_over(EXECUTOR, handle, 120) == "ended"
        assert [(e["attempt"], e["cause"]) for e in events(handle, "requeued")] == [(1, "preempted")]
        view = _view(handle)
        assert (view.state, view.stage("first").attempt) == ("succeeded", 2)


def _use(cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    return cluster


def _view(handle: JobHandle) -> RunView:
    """The run as the command line sees it."""
    return load_run(Path(handle.run_dir), EXECUTOR.liveness, EXECUTOR.settle)


def _received(tmp_path: Path, stage: str, rank: int = 0) -> dict[str, Any]:
    return read_json(tmp_path / "run" / stage / f"received-{rank}.json") or {}
