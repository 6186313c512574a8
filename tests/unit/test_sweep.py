"""Sweeps: which runs they make, what is refused before anything starts, and what a broken-off one leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes import lifecycle, sweep
from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.cli import sweep as sweep_command
from nemotron_recipes.cli.main import main
from nemotron_recipes.config.catalog import Catalog, config_roots
from nemotron_recipes.config.sweep import expand
from nemotron_recipes.errors import JobFailed, UserError
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.executors.slurm.script import resolved
from nemotron_recipes.lifecycle import Prepared
from nemotron_recipes.rundir import RunDir, append_event, read_jsonl
from nemotron_recipes.spec import JobHandle, Request, to_json
from tests.helpers.cli import nemotron

WORDS = ("data", "prep", "sft")
THREE = "data.pack_size=128,256,512"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    for colour in ("blue", "red"):
        file = tmp_path / "conf" / "colour" / f"{colour}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return Catalog(config_roots((), tmp_path))


def request(cwd: Path, *overrides: str, **fields: Any) -> Request:
    return Request("nano3", WORDS, "tiny", overrides=overrides, cwd=str(cwd), **fields)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=1,2", ["a=1", "a=2"]),
        ("a=1e-5,3e-5", ["a=1e-05", "a=3e-05"]),
        ("a=range(1,4)", ["a=1", "a=2", "a=3"]),
        ("+a='x,y',z", ["+a='x,y'", "+a=z"]),
        ("a=[1,2],[3]", ["a=[1,2]", "a=[3]"]),
        ("colour=glob(*)", ["colour=blue", "colour=red"]),
        ("colour=glob(*,exclude=b*)", ["colour=red"]),
        ("a=choice(x)", ["a=x"]),
    ],
)
def test_hydras_grammar(catalog: Catalog, text: str, values: list[str]) -> None:
    found = expand(["fixed=[1,2]", text], catalog)
    assert [chosen for chosen, _ in found] == [("fixed=[1,2]", value) for value in values]
    assert [swept for _, swept in found] == [(value,) for value in values]


def test_every_combination_the_first_varies_slowest(catalog: Catalog) -> None:
    assert [swept for _, swept in expand(["a=1,2", "b=x,y"], catalog)] == [
        ("a=1", "b=x"),
        ("a=1", "b=y"),
        ("a=2", "b=x"),
        ("a=2", "b=y"),
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["a=1", "b=[1,2]"], "no override has several values"),
        (["a=interval(0,1)"], "has no end"),
        (["a=1,2", "a=3,4"], "'a' sweeps twice"),
        (["a=range(0,2000)"], "2000 runs"),
        (["a=1,2,1"], "names a value twice"),
        (["colour=glob(nothing-like-it*)"], "no choice of colour"),
    ],
)
def test_what_is_no_sweep(catalog: Catalog, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        expand(overrides, catalog)


def test_without_multirun_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--multirun makes a run of each"):
        lifecycle.prepare(request(tmp_path, THREE))


def test_a_bad_combination_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        sweep.prepare(request(tmp_path, "data.pack_size=128,many", "data.no_such=1"), None)
    told = [problem.what for problem in refused.value.problems]
    assert "unknown key 'data.no_such'" in told, "what is wrong with all is said once"
    assert "data.pack_size=many: 'data.pack_size' should be a valid integer, not 'many'" in told
    assert len(told) == 2
    assert not (tmp_path / "nemotron-output").exists()


def test_the_dry_run_shows_every_run_and_writes_nothing(tmp_path: Path) -> None:
    said = nemotron(tmp_path, "nano3", *WORDS, "-c", "tiny", THREE, "--multirun", "--dry-run", "--json")
    tree = json.loads(said)
    assert [run["values"] for run in tree["runs"]] == [[f"data.pack_size={n}"] for n in (128, 256, 512)]
    assert [run["plan"]["stages"][0]["config"]["data"]["pack_size"] for run in tree["runs"]] == [128, 256, 512]
    assert [len(run["rendered"]["submit"]) for run in tree["runs"]] == [1, 1, 1]
    assert [run["plan"]["after"] for run in tree["runs"]] == [
        None,
        *(run["plan"]["run_dir"] for run in tree["runs"][:2]),
    ], "on this machine one after the other"
    assert not (tmp_path / "nemotron-output").exists()


def test_on_slurm_a_run_waits_for_the_one_that_many_before_it(tmp_path: Path) -> None:
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\ndependency = "after:7"\n')
    asked = request(tmp_path, "data.pack_size=128,256,512,1024", mode="batch", profile="lab")
    free = sweep.prepare(asked, None)
    assert [word for member in free.members for word in _command(member) if "dependency" in word] == []
    members = sweep.prepare(asked, 2).members
    waits = [[word for word in _command(member) if "dependency" in word] for member in members]
    assert waits == [
        [],
        [],
        *([f"--dependency=after:7,afterany:<job of {member.run}/last>"] for member in members[:2]),
    ]
    assert resolved(tuple(waits[2]), {f"{members[0].run}/last": "12"}, {}) == ["--dependency=after:7,afterany:12"]
    assert resolved(tuple(waits[2]), {}, {}) == ["--dependency=after:7"], "that run is over"
    assert resolved(("--dependency=afterany:<job of x/last>",), {}, {}) == []


def _command(member: sweep.Member) -> tuple[str, ...]:
    assert member.prepared is not None
    return member.prepared.rendered.submit[0]


@pytest.fixture
def fake_submit(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instead of an executor: notes which run was submitted, and fails at the ones that are named in `refused`."""
    submitted: list[str] = []

    def submit(prepared: Prepared, preflight: bool = True) -> JobHandle:
        run = RunDir(Path(prepared.plan.run_dir))
        if len(submitted) == 2 and not (run.path.parent / "mended").exists():
            raise JobFailed("the cluster went away")
        run.path.mkdir(parents=True, exist_ok=True)
        run.plan.write_text(to_json(prepared.plan))
        handle = JobHandle(
            "slurm", prepared.plan.id, prepared.plan.run_dir, {"jobs": {"data-prep-sft": "1"}, "names": {}}
        )
        run.handle.write_text(to_json(handle))
        append_event(run.events, "submitting", attempts={})
        submitted.append(prepared.plan.request.overrides[-1])
        return handle

    monkeypatch.setattr(lifecycle, "submit", submit)
    monkeypatch.setattr(lifecycle, "check", lambda *_: [])
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm: what has a handle and no end goes on
    return submitted


def test_what_was_broken_off_is_said_and_continued(tmp_path: Path, fake_submit: list[str]) -> None:
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\n')
    asked = request(tmp_path, "data.pack_size=128,256,512,1024", mode="batch", profile="lab")
    first = sweep.prepare(asked, 1)
    with pytest.raises(JobFailed, match="2 of 4 runs of the sweep are submitted") as broken:
        sweep.submit(first)
    assert first.members[1].run in str(broken.value)
    assert "the same command again" in str(broken.value)

    (tmp_path / "nemotron-output" / "runs" / "mended").touch()
    again = sweep.prepare(replace(asked, overrides=("data.pack_size=1024,512,256,128",)), 1)
    assert again.id == first.id, "the order is nothing of its identity"
    assert [member.values[0] for member in again.left] == ["data.pack_size=1024", "data.pack_size=512"]
    assert again.left[0].prepared is not None
    assert again.left[0].prepared.plan.after == first.members[0].run_dir, "behind what goes on already"
    sweep.submit(again)
    assert sorted(fake_submit) == [f"data.pack_size={n}" for n in (1024, 128, 256, 512)]
    assert sorted(sweep.runs_of(tmp_path / "nemotron-output", first.id)) == sorted(m.run for m in again.members)
    assert sweep.prepare(asked, 1).left == []
    forced = sweep.prepare(asked, 1, anew=True)
    assert forced.id != first.id
    (tmp_path / "nemotron-output" / "runs" / "mended").unlink()
    fake_submit.clear()
    with pytest.raises(JobFailed, match=f"runs cancel {forced.id}"):
        sweep.submit(forced)  # no command would find it again


def test_a_run_that_failed_gets_its_next_attempt(tmp_path: Path, fake_submit: list[str]) -> None:
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\n')
    asked = request(tmp_path, "data.pack_size=128,256", mode="batch", profile="lab")
    first = sweep.prepare(asked, None)
    sweep.submit(first)
    append_event(RunDir(Path(first.members[0].run_dir)).events, "finished", state="failed", stage=None, cause="x")
    (left,) = sweep.prepare(asked, None).left
    assert (left.run, left.values) == (first.members[0].run, first.members[0].values)


@pytest.mark.parametrize(
    ("swept", "asked"), [("model.dtype=float32,bfloat16", [True, True]), ("optimizer.lr=1e-3,1e-4", [True, False])]
)
def test_a_preflight_sees_every_run_that_differs_in_what_it_looks_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_submit: list[str], swept: str, asked: list[bool]
) -> None:
    """The second may not fit into memory where the first does."""
    found: list[bool] = []

    def fake_check(prepared: Prepared, preflight: bool, beside: list[Any]) -> list[Any]:
        found.append(preflight)
        return []

    monkeypatch.setattr(lifecycle, "check", fake_check)
    (tmp_path / "rows.jsonl").touch()
    overrides = (f"data.path={tmp_path}/rows.jsonl", swept)
    sweep.submit(sweep.prepare(Request("nano3", ("sft",), "tiny", overrides=overrides, cwd=str(tmp_path)), 1))
    assert found == asked


def test_what_a_run_ends_with_counts_after_its_record_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_submit: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The record says that it is done; then one of its containers fails, and with it the run."""
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\n')
    found = sweep.prepare(request(tmp_path, "data.pack_size=128,256", mode="batch", profile="lab"), None)
    handle = sweep.submit(found)[0]
    found = replace(found, members=found.members[:1])
    state, alive = "succeeded", ["running", "ended"]

    def fake_liveness(asked: JobHandle) -> str:
        nonlocal state
        state = "failed" if alive[0] == "ended" else state
        return alive.pop(0)

    def fake_views(folders: list[Path]) -> list[RunView]:
        return [RunView(found.members[0].run, str(folders[0]), "", "", state, (), {}, handle)]  # type: ignore[arg-type]

    monkeypatch.setattr(lifecycle, "liveness", fake_liveness)
    monkeypatch.setattr(lifecycle, "load_all", fake_views)
    (view,) = sweep_command._watched(found, [Path(handle.run_dir)], quiet=False).values()
    assert view.state == "failed"
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["succeeded", "failed"]


def test_two_people_do_not_submit_the_same_sweep_twice(tmp_path: Path, fake_submit: list[str]) -> None:
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\n')
    asked = request(tmp_path, "data.pack_size=128,256", mode="batch", profile="lab")
    mine, yours = sweep.prepare(asked, None), sweep.prepare(asked, None)
    sweep.submit(mine)
    with pytest.raises(UserError, match="somebody else has submitted sweep"):
        sweep.submit(yours)
    assert len(fake_submit) == 2


def test_only_slurm_leaves_the_number_open() -> None:
    assert SlurmExecutor.at_once is None


@pytest.mark.e2e
def test_a_sweep_on_this_machine_from_start_to_end(tmp_path: Path) -> None:
    words = ("nano3", *WORDS, "-c", "tiny", "--sample", "40", "data.pack_size=128,256", "--multirun")
    said = nemotron(tmp_path, *words)
    assert "2 succeeded" in said
    runs = [line.split()[2] for line in said.splitlines() if line.startswith("succeeded")]
    told = [
        {e["event"]: e["time"] for e in read_jsonl(tmp_path / "nemotron-output/runs" / run / "events.jsonl")}
        for run in runs
    ]
    assert "waiting" not in told[0]
    assert told[1]["stage-started"] > told[0]["finished"], "one after the other"
    assert "0 to submit" in nemotron(tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-parallel", "2"), "--max-parallel goes with --multirun"),
        (("--multirun", "--plan-out", "x.json", THREE), "--plan-out is for one run"),
        (("--multirun",), "no override has several values"),
        (("--multirun", "--max-parallel", "0", THREE), "--max-parallel"),
    ],
)
def test_options_that_do_not_fit(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["nano3", *WORDS, "-c", "tiny", "--dry-run", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_one_that_cannot_be_stopped_does_not_let_the_others_run(
    tmp_path: Path, fake_submit: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\n')
    found = sweep.prepare(request(tmp_path, "data.pack_size=128,256", mode="batch", profile="lab"), 1)
    sweep.submit(found)
    asked = []

    def fake_cancel(handle: JobHandle) -> None:
        asked.append(handle.run)
        if len(asked) == 1:
            raise JobFailed(f"run {handle.run}: its job did not end")

    monkeypatch.setattr(lifecycle, "cancel", fake_cancel)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["runs", "cancel", found.id])
    assert sorted(asked) == sorted(member.run for member in found.members)
    assert ended.value.code == 1
    assert f"error: run {asked[0]}: its job did not end" in capsys.readouterr().err
