"""The local executor beyond the contract: a driver that dies, starts twice or can't start; what `check` refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import JobFailed, UserError
from nemotron_recipes.executors.docker.profile import DockerProfile
from nemotron_recipes.executors.local import process_tree
from nemotron_recipes.executors.local.executor import LocalExecutor, LocalProfile
from nemotron_recipes.executors.slurm.profile import SlurmProfile
from nemotron_recipes.rundir import RUN_ID_ENV, RunDir, append_event, read_jsonl
from nemotron_recipes.spec import JobHandle, StagePlan
from tests.helpers.executor_harness import events, placement, wait_for, wait_until_over
from tests.helpers.plans import ROOT, plan_of, probe_stage, submit, write_run

EXECUTOR = LocalExecutor()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("NEMORUN_HOME", raising=False)


def stage_of(name: str = "first", **orders: Any) -> StagePlan:
    return probe_stage(name, placement=placement(EXECUTOR), **orders)


def wait_for_probe(run_dir: Path, stage: str = "first") -> None:
    wait_for((RunDir(run_dir).stage(stage).path / "received-0.json").exists)


def test_a_killed_driver_leaves_an_orphan_that_counts_as_running_until_cancelled(tmp_path: Path) -> None:
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage_of(sleep=120, children=1)))
    wait_for_probe(tmp_path / "run")
    os.kill(handle.native["pid"], signal.SIGKILL)
    wait_for(lambda: process_tree.find(handle.native["pid"], handle.native["created"], handle.run) is None)
    assert EXECUTOR.liveness(handle) == EXECUTOR.together([handle]).liveness(handle) == "running"
    EXECUTOR.cancel(handle)
    assert process_tree.members(handle.run) == []
    assert EXECUTOR.liveness(handle) == "ended"
    assert [e["event"] for e in events(handle)] == ["driver-started", "stage-started", "cancelled"]


def test_a_run_whose_driver_and_stage_are_gone_without_a_word_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path / "run", stage_of(sleep=3), stage_of("second"))
    handle, _ = submit(EXECUTOR, plan)
    wait_for_probe(tmp_path / "run")
    os.kill(handle.native["pid"], signal.SIGKILL)
    assert wait_until_over(EXECUTOR, handle) == "lost"
    scans: list[int] = []
    runs_alive = process_tree.runs_alive
    monkeypatch.setattr(process_tree, "runs_alive", lambda: scans.append(1) or runs_alive())
    together = EXECUTOR.together([handle] * 3)
    assert [together.liveness(handle) for _ in range(3)] == ["lost"] * 3
    assert scans == [1], "however many runs are lost, the processes are looked through once"
    handle, _ = submit(EXECUTOR, plan)  # the first stage did succeed; nobody was there to start the second
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert events(handle, "stage-skipped") == [
        {"event": "stage-skipped", "stage": "first", "reason": "already succeeded"}
    ]
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}


def test_a_run_waits_until_another_is_over_even_if_that_has_lost_its_driver(tmp_path: Path) -> None:
    first, _ = submit(EXECUTOR, plan_of(tmp_path / "first", stage_of(lines=-1)))
    waiting = [
        submit(EXECUTOR, replace(plan_of(tmp_path / name, stage_of()), after=first.run_dir))[0]
        for name in ("second", "third")
    ]
    for handle in waiting:
        wait_for(lambda handle=handle: EXECUTOR.liveness(handle) == "queued")
    wait_for_probe(tmp_path / "first")
    EXECUTOR.cancel(waiting[1])
    assert [event["event"] for event in events(waiting[1])] == ["driver-started", "waiting", "cancelled"]
    os.kill(first.native["pid"], signal.SIGKILL)
    wait_for(lambda: process_tree.find(first.native["pid"], first.native["created"], first.run) is None)
    assert EXECUTOR.liveness(waiting[0]) == "queued", "what the driver has started goes on"
    (tmp_path / "first" / "first" / "enough").touch()
    assert wait_until_over(EXECUTOR, waiting[0]) == "ended"
    assert events(waiting[0])[-1] == {"event": "finished", "state": "succeeded"}
    (started,) = [e for e in read_jsonl(RunDir(tmp_path / "second").events) if e["event"] == "stage-started"]
    assert started["time"] > (tmp_path / "first" / "first" / "record.json").stat().st_mtime


@pytest.mark.parametrize("kill_driver", [False, True])
def test_a_run_that_is_running_does_not_start_twice(tmp_path: Path, kill_driver: bool) -> None:
    plan = plan_of(tmp_path / "run", stage_of(sleep=120))
    handle, rendered = submit(EXECUTOR, plan)
    try:
        wait_for_probe(tmp_path / "run")
        if kill_driver:
            os.kill(handle.native["pid"], signal.SIGKILL)
        with pytest.raises(UserError, match="is running already"):
            EXECUTOR.submit(plan, rendered)
        assert len(events(handle, "driver-started")) == 1
    finally:
        EXECUTOR.cancel(handle)


def test_of_two_submissions_at_once_one_runs(tmp_path: Path) -> None:
    for turn in range(2):
        plan = plan_of(tmp_path / f"run{turn}", stage_of(sleep=120))
        rendered = EXECUTOR.render(plan)
        write_run(plan, rendered)
        with ThreadPoolExecutor(2) as pool:
            tries = [pool.submit(EXECUTOR.submit, plan, rendered) for _ in range(2)]
        accepted = [t.result() for t in tries if t.exception() is None]
        refused = [str(t.exception()) for t in tries if t.exception() is not None]
        for handle in accepted:
            EXECUTOR.cancel(handle)
        assert len(accepted) == 1, refused
        assert "is running already" in refused[0]
        assert len(events(accepted[0], "driver-started")) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_driver_stops_the_stage_and_is_recorded(tmp_path: Path, signum: int) -> None:
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage_of(sleep=120), stage_of("second")))
    wait_for_probe(tmp_path / "run")
    os.kill(handle.native["pid"], signum)
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert [e["event"] for e in events(handle)] == ["driver-started", "stage-started", "stage-exited", "cancelled"]
    assert events(handle, "stage-exited")[0]["exit_code"] == 128 + signal.SIGTERM
    assert events(handle)[-1] == {"event": "cancelled", "stage": "first", "attempt": 1}


def test_a_run_that_is_cancelled_as_it_starts_leaves_nothing(tmp_path: Path) -> None:
    """Whether its first stage has been started by then or not."""
    for turn in range(3):
        handle, _ = submit(EXECUTOR, plan_of(tmp_path / f"run{turn}", stage_of(sleep=120)))
        EXECUTOR.cancel(handle)
        told = [event["event"] for event in events(handle)]
        stages = [name for name in told if name.startswith("stage-")]
        assert (told[0], told[-1], stages) in [
            ("driver-started", "cancelled", []),
            ("driver-started", "cancelled", ["stage-started", "stage-exited"]),
        ]
        assert process_tree.members(handle.run) == []


def test_a_stage_gets_its_grace_and_no_more(tmp_path: Path) -> None:
    deaf = replace(stage_of(sleep=120, deaf=True), placement=placement(EXECUTOR, grace_seconds=2.0))
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", deaf))
    wait_for_probe(tmp_path / "run")
    begun = time.monotonic()
    EXECUTOR.cancel(handle)
    assert 2.0 <= time.monotonic() - begun < 20.0
    assert events(handle, "stage-exited")[0]["exit_code"] == 128 + signal.SIGKILL


def test_a_driver_that_can_not_start_says_why(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", stage_of())
    rendered = EXECUTOR.render(plan)
    write_run(plan, rendered)
    RunDir(tmp_path / "run").rendered.unlink()
    with pytest.raises(JobFailed, match=r"rendered\.json"):
        EXECUTOR.submit(plan, rendered)


def test_a_program_that_can_not_start_fails_the_run(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", stage_of())
    rendered = EXECUTOR.render(plan)
    broken = replace(rendered, stages=(replace(rendered.stages[0], argv=("/no/such/python", "-m", "x")),))
    write_run(plan, broken)
    handle = EXECUTOR.submit(plan, broken)
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert "/no/such/python" in events(handle)[-1]["cause"]
    assert events(handle)[-1]["state"] == "failed"


def test_the_driver_outlives_the_terminal(tmp_path: Path) -> None:
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage_of(sleep=120)))
    try:
        wait_for_probe(tmp_path / "run")
        driver = handle.native["pid"]
        assert os.getsid(driver) == driver != os.getsid(0)
        assert Path(f"/proc/{driver}/fd/0").resolve() == Path(os.devnull) or sys.platform != "linux"
    finally:
        EXECUTOR.cancel(handle)


def test_nemo_run_writes_to_the_run_folder_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage_of()))
    wait_until_over(EXECUTOR, handle)
    assert list((tmp_path / "run" / "nemo_run" / "experiments").iterdir())
    assert not (tmp_path / "home").exists()
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "mine"))
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run2", stage_of()))
    wait_until_over(EXECUTOR, handle)
    assert list((tmp_path / "mine" / "experiments").iterdir())
    assert not (tmp_path / "run2" / "nemo_run").exists()


def test_a_home_for_nemo_run_that_can_not_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMORUN_HOME", f"{os.devnull}/home")
    (problem,) = EXECUTOR.preflight(plan_of(tmp_path / "run", stage_of()))
    assert "/dev/null: Not a directory" in problem.what
    assert problem.where == "NEMORUN_HOME"


def test_a_stage_that_nemo_run_can_not_know_of_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMORUN_HOME", f"{os.devnull}/home")
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage_of(sleep=120)))
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert (events(handle)[-1]["state"], events(handle)[-1]["stage"]) == ("failed", None)
    assert "Not a directory" in events(handle)[-1]["cause"]
    assert process_tree.members(handle.run) == []


def test_a_handle_of_another_machine_is_not_acted_on(tmp_path: Path) -> None:
    native = {"host": "another-machine", "pid": os.getpid(), "created": time.time()}
    handle = JobHandle("local", "a-run-elsewhere", str(tmp_path), native)
    assert EXECUTOR.liveness(handle) == "running"
    with pytest.raises(UserError, match="another-machine"):
        EXECUTOR.cancel(handle)
    append_event(RunDir(tmp_path).events, "finished", state="succeeded")
    assert EXECUTOR.liveness(handle) == "ended"


def test_a_machine_that_was_renamed_still_finds_its_runs(tmp_path: Path) -> None:
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage_of(sleep=120)))
    renamed = replace(handle, native={**handle.native, "host": "before"})
    assert EXECUTOR.liveness(renamed) == "running"
    EXECUTOR.cancel(renamed)
    assert process_tree.members(handle.run) == []


def test_a_recycled_pid_is_not_the_driver() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        created = psutil.Process(stranger.pid).create_time()
        assert process_tree.find(stranger.pid, created, "some-run") is None
    environ = {**os.environ, RUN_ID_ENV: "some-run"}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environ) as marked:
        wait_for(lambda: process_tree.find(marked.pid, created, "some-run"))
        assert process_tree.find(marked.pid, created - 3600, "some-run") is None


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"env": {"NEMOTRON_ATTEMPT": "7"}}, "NEMOTRON_ATTEMPT"),
        ({"env": {"NEMOTRON_RUN_ID": "x"}}, "NEMOTRON_RUN_ID"),
        ({"env": {"A B": "x"}}, "A B"),
        ({"env": {"A_TOKEN": "x"}, "secrets": ["A_TOKEN"]}, "secret"),
        ({"env": {"OTHER": "the-value-of-it"}, "secrets": ["A_TOKEN"]}, "plain text"),
        ({"env": {"LONG": "x" * 200_000}}, "longer"),
    ],
)
def test_check_refuses(fields: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "the-value-of-it")
    stage = probe_stage("first", placement=placement(EXECUTOR, **fields))
    problems = list(EXECUTOR.check(replace(stage, directory="/run/first")))
    assert len(problems) == 1
    assert told in problems[0].what
    assert problems[0].where
    assert problems[0].fix
    assert "the-value-of-it" not in str(problems[0])


@pytest.mark.parametrize(
    "fields", [{"nodes": 2}, {"nproc_per_node": 0}, {"nproc_per_node": "2"}, {"gpus": 8}, {"env": {"A": 1}}]
)
def test_a_profile_is_closed_and_strict(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LocalProfile(**fields)


def test_torchrun_is_shown_as_it_runs() -> None:
    stage = probe_stage("first", ("a $b",), placement=placement(EXECUTOR, nproc_per_node=2), launcher="torchrun")
    (rendered,) = EXECUTOR.render(plan_of(Path("/out/runs/r1"), stage)).stages
    assert rendered.argv == (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"),
        *("--nnodes=1", "--nproc-per-node=2", "--max-restarts=0", "--log-dir=/out/runs/r1/first/logs/torchrun"),
        *("-m", "tests.helpers.probe", "a $$b"),
    )


def test_a_dry_run_needs_neither_nemo_run_nor_psutil() -> None:
    code = (
        "import sys, nemotron_recipes.executors.local.executor; "
        "sys.exit(bool({'nemo_run', 'psutil', 'torch'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_example_profiles_are_valid(tmp_path: Path) -> None:
    text = (ROOT / "env.toml").read_text()
    (tmp_path / "env.toml").write_text(text)
    profiles = read_environment(tmp_path, {}).profiles
    assert LocalProfile(**profiles["local"]) == LocalProfile()
    example = "".join(line.removeprefix("# ") for line in text.splitlines(True)[3:])  # all that is commented out
    (tmp_path / "env.toml").write_text(example)
    environment = read_environment(tmp_path, {})
    assert LocalProfile(**environment.profiles["two"]).grace_seconds == 60.0
    assert SlurmProfile(**environment.profiles["YOUR-CLUSTER"]).nproc_per_node == 8
    assert DockerProfile(**environment.profiles["YOUR-SPARK"]).ipc == "host"
    assert environment.store == Path("/shared/team/nemotron-store")
    assert {"entity": "my-team", "project": "nemotron"}.items() <= dict(environment.wandb).items()
