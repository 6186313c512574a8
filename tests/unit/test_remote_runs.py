"""Runs on a cluster behind SSH that can't be asked, and plans that may not go to another one. No ssh is run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from nemotron_recipes import lifecycle, sweep
from nemotron_recipes.errors import UserError
from nemotron_recipes.executors.remote import there
from nemotron_recipes.executors.remote.ssh_login import Login
from nemotron_recipes.executors.remote.ssh_session import Connection
from nemotron_recipes.executors.remote.transport import Unreachable
from nemotron_recipes.rundir import RunDir, append_event, write_sealed
from nemotron_recipes.spec import JobHandle, Request
from tests.helpers.plans import plan_of, probe_stage
from tests.unit.test_slurm_render import placement_of

ELSEWHERE = ("run.tunnel=ssh", "run.host=cluster", "run.remote_job_dir=/far")


def test_a_run_whose_ssh_configuration_is_gone_hides_no_other(tmp_path: Path) -> None:
    for name, native in (
        ("stale", {"remote": {**asdict(Login("cluster", config=str(tmp_path / "gone"))), "run_dir": "/far/run"}}),
        ("ended", {}),
    ):
        run = RunDir(tmp_path / "runs" / name)
        plan = plan_of(run.path, probe_stage("first", placement=placement_of()))
        write_sealed(run.plan, asdict(plan))
        native = {"jobs": {"first": "1"}, "names": {}, "tokens": {"first": "a"}, **native}
        write_sealed(run.handle, asdict(JobHandle("slurm", plan.id, str(run.path), native)))
        append_event(run.events, "submitting", attempts={"first": 1})
    append_event(run.events, "cancelled", stage=None, attempt=None)
    views = {Path(view.path).name: view for view in lifecycle.newest_runs(tmp_path / "runs", None)}
    assert views["ended"].state == "cancelled" and views["stale"].state == "pending"
    (said,) = views["stale"].differences
    assert "can't be asked" in said and "gone, which is not a file" in said
    assert lifecycle.load(tmp_path / "runs" / "stale").state == "pending"


def test_what_this_machine_lacks_for_a_connection_is_said_with_its_fix(tmp_path: Path) -> None:
    connection = Connection(Login("cluster", config=str(tmp_path / "gone")))
    for _ in range(2):  # the second time it is known
        with pytest.raises(Unreachable, match="which is not a file") as caught:
            connection.call(there.user)
        assert caught.value.fix == "mend it in env.toml"


def test_no_override_sends_a_plan_of_this_machine_to_another(tmp_path: Path) -> None:
    (tmp_path / "env.toml").write_text("[here]\nexecutor = 'slurm'\n")
    fields = {"cwd": str(tmp_path), "profile": "here", "mode": "batch"}
    request = Request("nano3", ("data", "prep", "sft"), "tiny", overrides=ELSEWHERE, **fields)
    with pytest.raises(UserError, match=r"run\.tunnel"):
        lifecycle.prepare(request)
    swept = (*ELSEWHERE, "data.pack_size=128,256")
    with pytest.raises(UserError, match=r"run\.tunnel"):
        sweep.prepare(Request("nano3", ("data", "prep", "sft"), "tiny", overrides=swept, **fields), None)


def test_what_is_wrong_with_a_tunnel_is_said_before_anybody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("[far]", "executor = 'slurm'", "tunnel = 'ssh'", "identity = '/no/key'", "remote_job_dir = 'runs'")
    (tmp_path / "env.toml").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    request = Request("nano3", ("data", "prep", "sft"), "tiny", cwd=str(tmp_path), profile="far", mode="batch")
    for ask in (
        lambda: lifecycle.prepare(request),
        lambda: lifecycle.examine("far"),
        lambda: lifecycle.store_of("far"),
    ):
        with pytest.raises(UserError) as caught:
            ask()
        said = " ".join(problem.what for problem in caught.value.problems)
        assert "needs host" in said and "'runs' is no full path" in said and "/no/key, which is not a file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["env.toml"]
