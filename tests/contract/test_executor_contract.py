"""What every executor must do; a new row in the registry brings itself under these tests.

Each test renders a plan whose stages run tests/helpers/probe.py, submits it for real, and looks at what arrived.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_recipes.executors import REGISTRY, Executor, get_executor
from nemotron_recipes.executors.local import process_tree
from nemotron_recipes.rundir import ATTEMPT_ENV, RunDir, read_json
from nemotron_recipes.spec import Artifact, JobHandle
from tests.helpers.executor_harness import HARNESSES, events, placement, wait_for, wait_until_over
from tests.helpers.plans import ROOT, plan_of, probe_stage, submit, write_run
from tests.helpers.probe import digest

HOSTILE = (
    "two words",
    "'single' \"double\" `back`",
    "$(touch pwned) ; touch pwned & | > pwned",
    "${app_id} ${img_root} ${replica_id} ${local_rank} $app_id ${HOME} $HOME",
    "$ $$ $$$ $$$$ %s {0} {{x}}",
    "line\nline\r\n\ttab",
    "\\ \\n \\\\ trailing\\",
    "--nproc-per-node=3",
    "-c",
    "é ü 漢字 😀 \u202e",
    "*?[a]~ !! #",
    "",
    "\x1b[31m\x07",
)


@pytest.fixture(
    params=[
        pytest.param(name, marks=getattr(pytest.mark, name) if name in ("docker", "slurm") else ())
        for name in sorted(REGISTRY)
    ]
)
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Executor:
    fixture = HARNESSES[request.param].fixture
    if fixture:
        for name, value in request.getfixturevalue(fixture).env.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")  # else Python itself adds LC_CTYPE to what its children inherit
    monkeypatch.delenv("NEMORUN_HOME", raising=False)
    return get_executor(request.param)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "out put" / "runs" / "the 'run' $$ ${app_id} $(x) é"


def test_every_executor_has_a_harness() -> None:
    assert set(HARNESSES) == set(REGISTRY)


def test_render_writes_nothing_and_repeats_itself(executor: Executor, run_dir: Path, tmp_path: Path) -> None:
    plan = plan_of(
        run_dir,
        probe_stage("first", placement=placement(executor)),
        probe_stage("second", placement=placement(executor), launcher="torchrun"),
    )
    before = sorted(tmp_path.rglob("*"))
    children = psutil.Process().children(recursive=True)
    assert executor.render(plan) == executor.render(plan)
    assert sorted(tmp_path.rglob("*")) == before
    assert psutil.Process().children(recursive=True) == children


def test_render_names_the_files_of_the_plan_and_leaves_reused_stages_out(executor: Executor, run_dir: Path) -> None:
    made = Artifact("store", "data", name="made", version=1)
    plan = plan_of(
        run_dir,
        replace(probe_stage("first", placement=placement(executor)), reused=made),
        probe_stage("second", placement=placement(executor), files={"extra.yaml": "a: 1\n"}),
    )
    (stage,) = executor.render(plan).stages
    assert stage.name == "second"
    folder = RunDir(run_dir).stage("second").files
    assert stage.files[str(folder / "extra.yaml")] == "a: 1\n"
    assert {str(folder / name) for name in plan.stages[1].launch.files} <= set(stage.files)


def test_what_arrives_is_what_was_rendered(executor: Executor, run_dir: Path) -> None:
    text = "".join(HOSTILE)
    plan = plan_of(
        run_dir,
        probe_stage(
            "first",
            HOSTILE,
            placement=placement(executor, env={f"PROFILE_{n}": value for n, value in enumerate(HOSTILE)}),
            env={f"LAUNCH_{n}": value for n, value in enumerate(HOSTILE)},
            files={"hostile.txt": text},
        ),
    )
    handle, rendered = submit(executor, plan)
    assert wait_until_over(executor, handle) == "ended"
    received = _received(run_dir, "first")
    stage = rendered.stages[0]
    assert tuple(received["argv"]) == HOSTILE
    assert received["cwd"] == stage.cwd
    assert received["files"] == {Path(path).name: digest(content) for path, content in stage.files.items()}
    harness = HARNESSES[executor.name]
    expected = {**(os.environ if harness.inherits else {}), **stage.env, ATTEMPT_ENV: "1"}
    surrounding = harness.surrounding
    arrived = {name: value for name, value in received["env"].items() if not surrounding(name)}
    assert arrived == {name: digest(value) for name, value in expected.items() if not surrounding(name)}
    assert not list(run_dir.parent.rglob("pwned"))
    log = RunDir(run_dir).stage("first").launcher_log(1).read_text()
    assert log.splitlines() == ["probe: on stdout", "probe: on stderr"]


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=20, max_size=40)
)
def test_any_text_arrives(executor: Executor, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    plan = plan_of(
        run_dir,
        probe_stage("first", tuple(texts), placement=placement(executor, env=dict(_numbered("P", texts)))),
        probe_stage("second", tuple(reversed(texts)), placement=placement(executor), env=dict(_numbered("L", texts))),
    )
    handle, rendered = submit(executor, plan)
    assert wait_until_over(executor, handle) == "ended"
    for stage, planned in zip(rendered.stages, plan.stages, strict=True):
        received = _received(run_dir, stage.name)
        assert tuple(received["argv"]) == planned.launch.args
        assert {n: received["env"][n] for n in stage.env} == {n: digest(value) for n, value in stage.env.items()}


@pytest.mark.parametrize(
    ("orders", "code"),
    [
        ({"exit": 1}, 1),
        ({"exit": 3}, 3),
        ({"signal": signal.SIGKILL}, 137),
        ({"signal": signal.SIGTERM}, 143),
        ({"record": None}, 0),
        ({"record": "failed"}, 0),
    ],
)
def test_a_failure_is_told_as_it_was_and_stops_what_follows(
    executor: Executor, run_dir: Path, orders: dict[str, Any], code: int
) -> None:
    plan = plan_of(
        run_dir,
        probe_stage("first", placement=placement(executor), **orders),
        probe_stage("second", placement=placement(executor)),
    )
    handle, _ = submit(executor, plan)
    assert wait_until_over(executor, handle) == "ended"
    (exited,) = events(handle, "stage-exited")
    assert (exited["stage"], exited["attempt"], exited["exit_code"]) == ("first", 1, code)
    (finished,) = events(handle, "finished")
    assert (finished["state"], finished["stage"]) == ("failed", "first")
    assert str(code) in finished["cause"]
    assert not (RunDir(run_dir).stage("second").path / "received-0.json").exists()


def test_a_file_that_is_not_as_shown_any_more_stops_the_run(executor: Executor, run_dir: Path) -> None:
    plan = plan_of(run_dir, probe_stage("first", placement=placement(executor), files={"train.yaml": "a: 1\n"}))
    rendered = executor.render(plan)
    write_run(plan, rendered)
    (RunDir(run_dir).stage("first").files / "train.yaml").write_text("a: 2\n")
    handle = executor.submit(plan, rendered)
    assert wait_until_over(executor, handle) == "ended"
    assert "train.yaml" in events(handle)[-1]["cause"]
    assert not _received(run_dir, "first")


def test_success_is_told_stage_by_stage(executor: Executor, run_dir: Path) -> None:
    names = ("first", "second", "third")
    plan = plan_of(run_dir, *(probe_stage(name, placement=placement(executor)) for name in names))
    handle, _ = submit(executor, plan)
    assert wait_until_over(executor, handle) == "ended"
    told = [(e["event"], e["stage"]) for e in events(handle, "stage-started", "stage-exited")]
    assert told == [(event, name) for name in names for event in ("stage-started", "stage-exited")]
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}


def test_a_second_submission_continues_where_the_first_failed(executor: Executor, run_dir: Path) -> None:
    first = probe_stage("first", placement=placement(executor))
    plan = plan_of(run_dir, first, probe_stage("second", placement=placement(executor), exit=1, record="failed"))
    handle, _ = submit(executor, plan)
    wait_until_over(executor, handle)
    mended = plan_of(run_dir, first, probe_stage("second", placement=placement(executor)))
    handle, _ = submit(executor, mended)
    assert wait_until_over(executor, handle) == "ended"
    assert [(e["stage"], e["attempt"]) for e in events(handle, "stage-started")] == [
        ("first", 1),
        ("second", 1),
        ("second", 2),
    ]
    assert _received(run_dir, "second")["env"][ATTEMPT_ENV] == digest("2")
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}


def test_cancel_leaves_no_process(executor: Executor, run_dir: Path) -> None:
    plan = plan_of(
        run_dir,
        probe_stage("first", placement=placement(executor), sleep=120, children=2, deaf=True),
        probe_stage("second", placement=placement(executor)),
    )
    handle, _ = submit(executor, plan)
    wait_for(lambda: _received(run_dir, "first"))
    assert executor.liveness(handle) == "running"
    assert len(process_tree.members(handle.run)) >= 3
    executor.cancel(handle)
    assert process_tree.members(handle.run) == []
    assert executor.liveness(handle) == "ended"
    assert events(handle)[-1]["event"] == "cancelled"
    assert not RunDir(run_dir).stage("second").path.joinpath("received-0.json").exists()
    executor.cancel(handle)  # a second time changes nothing
    assert len(events(handle, "cancelled")) == 1


def test_a_handle_works_from_another_process(executor: Executor, run_dir: Path) -> None:
    plan = plan_of(run_dir, probe_stage("first", placement=placement(executor), sleep=120))
    submitted, _ = submit(executor, plan)
    saved = read_json(RunDir(run_dir).handle)
    assert saved is not None, "the handle is durable when submit returns"
    handle = JobHandle(**saved)
    assert handle == submitted
    wait_for(lambda: executor.liveness(handle) != "queued")
    assert executor.liveness(handle) == "running"
    executor.cancel(handle)
    assert executor.liveness(handle) == "ended"


def test_secrets_are_inherited_and_never_written(
    executor: Executor, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "s3cr3t-do-not-write-me"
    monkeypatch.setenv("A_TOKEN", secret)
    stage = probe_stage("first", placement=placement(executor, secrets=["A_TOKEN"]))
    plan = plan_of(run_dir, stage)
    assert list(executor.check(plan.stages[0])) == []
    handle, rendered = submit(executor, plan)
    assert wait_until_over(executor, handle) == "ended"
    assert _received(run_dir, "first")["env"]["A_TOKEN"] == digest(secret)
    assert secret not in repr(rendered)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 5
    assert [p for p in files if secret.encode() in p.read_bytes()] == []


def test_an_unset_secret_is_a_problem(executor: Executor, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    plan = plan_of(run_dir, probe_stage("first", placement=placement(executor, secrets=["NO_SUCH_TOKEN"])))
    (problem,) = executor.check(plan.stages[0])
    assert "NO_SUCH_TOKEN" in problem.what
    assert problem.fix


@pytest.mark.parametrize("text", ["a\0b", "a\udcffb"])
def test_what_can_not_arrive_is_refused(executor: Executor, run_dir: Path, text: str) -> None:
    fine = probe_stage("first", placement=placement(executor))
    assert list(executor.check(fine)) == []
    for stage in (
        probe_stage("first", (text,), placement=placement(executor)),
        probe_stage("first", placement=placement(executor), env={"NAME": text}),
        probe_stage("first", placement=placement(executor, env={"NAME": text})),
        replace(fine, directory=f"/{text}"),
    ):
        assert list(executor.check(stage)), stage


@pytest.mark.e2e
def test_torchrun_delivers_the_same_to_every_rank(executor: Executor, run_dir: Path) -> None:
    stage = probe_stage("first", HOSTILE, placement=placement(executor, nproc_per_node=2), launcher="torchrun")
    handle, _ = submit(executor, plan_of(run_dir, stage))
    assert wait_until_over(executor, handle, 120) == "ended"
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}
    for rank in (0, 1):
        received = _received(run_dir, "first", rank)
        assert tuple(received["argv"]) == HOSTILE
        assert received["env"]["RANK"] == digest(str(rank))
        assert received["env"]["WORLD_SIZE"] == digest("2")


@pytest.mark.e2e
@pytest.mark.parametrize(("orders", "code"), [({"exit": 3}, 3), ({"signal": signal.SIGKILL}, 137)])
def test_torchrun_tells_which_rank_failed(executor: Executor, run_dir: Path, orders: dict[str, Any], code: int) -> None:
    stage = probe_stage(
        "first", placement=placement(executor, nproc_per_node=2), launcher="torchrun", failing_rank="1", **orders
    )
    handle, _ = submit(executor, plan_of(run_dir, stage))
    assert wait_until_over(executor, handle, 120) == "ended"
    (exited,) = events(handle, "stage-exited")
    assert (exited["exit_code"], exited["rank"], exited["rank_exit_code"]) == (1, 1, code)
    assert f"rank 1 ended with exit code {code}" in events(handle, "finished")[0]["cause"]


@pytest.mark.e2e
def test_cancel_under_torchrun_leaves_no_process(executor: Executor, run_dir: Path) -> None:
    stage = probe_stage(
        "first",
        placement=placement(executor, nproc_per_node=2),
        launcher="torchrun",
        sleep=120,
        children=1,
        deaf=True,
    )
    handle, _ = submit(executor, plan_of(run_dir, stage))
    for rank in (0, 1):
        wait_for(lambda rank=rank: _received(run_dir, "first", rank))
    assert len(process_tree.members(handle.run)) >= 4
    executor.cancel(handle)
    assert process_tree.members(handle.run) == []
    assert executor.liveness(handle) == "ended"


def _received(run_dir: Path, stage: str, rank: int = 0) -> dict[str, Any]:
    path = RunDir(run_dir).stage(stage).path / f"received-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _numbered(prefix: str, texts: list[str]) -> list[tuple[str, str]]:
    return [(f"{prefix}_{n}", text) for n, text in enumerate(texts)]
