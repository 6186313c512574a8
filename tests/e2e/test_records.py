"""A run folder explains its run, the run can be made again to the same weights, and runs lie side by side."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from nemotron_recipes.artifacts.lineage import lineage
from nemotron_recipes.artifacts.records import load_run
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import UserError
from nemotron_recipes.mirror.journal import pending
from nemotron_recipes.report.document import report
from nemotron_recipes.report.html import lineage_page, run_page
from nemotron_recipes.report.verify import damage
from nemotron_recipes.rundir import RunDir, read_json
from tests.helpers.cli import ROOT, nemotron
from tests.helpers.fake_wandb import KEY, FakeWandb
from tests.helpers.leaks import leaks

pytestmark = pytest.mark.e2e
SFT = ("nano3", "sft", "-c", "tiny", "train.train_iters=2", "evaluation.rows=0")
PLANTED = 'planted/secret+"4711"~x'


@pytest.fixture(scope="module")
def wandb() -> Iterator[FakeWandb]:
    with FakeWandb() as server:
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, wandb: FakeWandb) -> Path:
    """Prepared data, an SFT run, and the same run made again; mirrored, with a secret in the environment."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "env.toml").write_text('[wandb]\nproject = "p"\nentity = "team"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", wandb.url)
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("SOME_API_KEY", PLANTED)
        patch.setenv("NEMOTRON_NOTE", f"https://user:{PLANTED}@example.com")
        nemotron(folder, "nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "40")
        nemotron(folder, *SFT)
        nemotron(folder, "rerun", runs(folder)[0]["id"])
        nemotron(folder, "artifacts", "sync")
    return folder


def runs(folder: Path) -> list[dict[str, Any]]:
    """The SFT runs, newest first."""
    found = json.loads(nemotron(folder, "runs", "list", "--json"))
    return [run for run in found if run["stages"][0]["name"] == "sft"]


def test_a_rerun_is_a_new_run_with_the_same_weights(place: Path) -> None:
    again, first = runs(place)
    plan = read_json(RunDir(Path(again["run_dir"])).plan)
    assert plan and (plan["id"], plan["rerun_of"]) == (again["id"], first["id"])
    outputs = [run["stages"][0]["outputs"]["model"] for run in (first, again)]
    assert [made["version"] for made in outputs] == [1, 2]
    assert outputs[0]["digest"] == outputs[1]["digest"]
    assert first["stages"][0]["fingerprint"] == again["stages"][0]["fingerprint"]
    text = (Path(again["run_dir"]) / "sft/files/train.yaml").read_text()
    assert first["id"] not in text and again["id"] in text
    found = json.loads(nemotron(place, "runs", "diff", first["id"], again["id"], "--json"))
    assert found["runs"] == [first["id"], again["id"]]
    assert {name: rows for name, rows in found.items() if rows and name != "runs"} == {}, "nothing differs"


def test_the_run_folder_says_where_it_ran_and_names_secrets_only(place: Path) -> None:
    run = RunDir(Path(runs(place)[1]["run_dir"]))
    facts = read_json(run.stage("sft").environment(1))
    assert facts is not None
    assert facts["packages"]["torch"] and facts["python"] and facts["cpus"] >= 1 and facts["host"]
    assert "SOME_API_KEY" in facts["secrets"] and facts["variables"]["NEMOTRON_RUN_ID"] == run.path.name
    assert facts["variables"]["NEMOTRON_NOTE"] == "https://[hidden]@example.com"
    store, view = Store(place / "nemotron-output/store"), load_run(run.path)
    made = store.resolve("nano3-tiny-sft")
    root = lineage(store, made)
    pages = {"lineage.html": lineage_page(root), "run.html": run_page(view)}
    for name, text in {**pages, "report.md": report(store, made, root, view, curves=False)}.items():
        (place / name).write_text(text)
    assert leaks(PLANTED, [place]) == [] and leaks(KEY, [place]) == []
    hidden = base64.b64encode(f"user:{PLANTED}".encode()).decode()
    plain = base64.b64encode(PLANTED.encode()).decode()
    for form in (PLANTED, json.dumps(PLANTED), quote(PLANTED, safe=""), hidden, plain):
        (place / "leak").write_text(f"before {form} after")  # the search itself works
        assert leaks(PLANTED, [place]) == [str(place / "leak")], form
    (place / "leak").unlink()


def test_wandb_shows_the_same_graph_and_curves(place: Path, wandb: FakeWandb) -> None:
    """Told by the processes beside the workers and by `artifacts sync`, whoever came first."""
    assert wandb.unknown == [], "the SDK made a call that nobody has looked at"
    output = place / "nemotron-output"
    assert pending(output) == []
    assert "nothing to tell" in nemotron(place, "artifacts", "sync")
    store = Store(output / "store")
    local = set()
    for name in store.names():
        for version in store.versions(name):
            artifact = store.resolve(f"{name}:v{version}")
            made = artifact.producer
            assert made is not None
            local.add(("made", f"{made.run}.{made.stage}", f"{name}.v{version}"))
            parents = [parent for parent in store.describe(artifact)["parents"] if parent["source"] == "store"]
            local |= {("used", f"{made.run}.{made.stage}", f"{p['name']}.v{p['version']}") for p in parents}
    label = {
        f"{a.collection}:v{a.number}": alias.rpartition(".")[0]
        for a in wandb.artifacts.values()
        for alias in a.aliases
        if alias.count(".v") == 1
    }
    assert {(what, run, label[name]) for what, run, name in wandb.edges() if name in label} == local
    for run in runs(place):
        told = wandb.runs[f"{run['id']}.sft"]
        assert [told.history[n]["_step"] for n in sorted(told.history)] == [1, 2]
        assert told.complete and told.exit_code == 0 and told.group == run["id"]
    sent = [*wandb.bodies, *wandb.blobs.values()]
    assert leaks(PLANTED, [], sent) == [] and leaks(KEY, [], sent) == []


# Every kind of file below the output folder: those that a digest guards, and those that nothing reads back.
GUARDED = (
    r"runs/[^/]+/(plan|rendered|handle|closed)\.json",
    r"runs/[^/]+/(events\.jsonl|driver\.log|code\.patch)",
    r"runs/[^/]+/code/nemotron_recipes/.*",
    r"runs/[^/]+/mirror/(target\.json|journal\.jsonl|done\.jsonl)",
    r"runs/[^/]+/[^/]+/(record\.json|metrics\.jsonl)",
    r"runs/[^/]+/[^/]+/files/.*",
    r"runs/[^/]+/[^/]+/events/.*\.jsonl",
    r"runs/[^/]+/[^/]+/environment/.*\.json",
    r"runs/[^/]+/[^/]+/logs/attempt-1/(rank-0|launcher)\.log",
    r"store/[^/]+/v\d+/(artifact|files)\.json",
    r"store/[^/]+/v\d+/content/.*",
    r"store/[^/]+/\.aliases/.*",
)
NOT_READ = (
    r".*/__pycache__/.*|.*\.lock",
    r"runs/[^/]+/mirror/(idle|lease-\d+|replay\.log)",
    r"runs/[^/]+/[^/]+/(curves\.png|metrics-tensorboard/.*)",
    r"runs/[^/]+/nemo_run/.*",  # NeMo-Run's own
    r"store/\.spools/.*",  # data prep's cache: what is damaged is made anew (tests/unit/test_data_prepare.py)
    r"runs/[^/]+/[^/]+/heartbeats/.*",  # of a run that goes on: sealed, and a damaged one counts as none
    r"runs/[^/]+/[^/]+/checkpoints/.*",  # TRL's, when training goes on: tests/unit/test_trl_checkpoints.py
    r"store/\.index/.*|mirror/(attempted|pending/.*)",  # empty
)

CUT_IS_HARMLESS = "done.jsonl"  # what was told after the end of the run: it is told once more, which is as good as once


def test_a_byte_changed_or_cut_in_any_kind_of_file_is_named(place: Path) -> None:
    output = place / "nemotron-output"
    Store(output / "store").alias("nano3-tiny-sft", "best", 1)
    first = RunDir(Path(runs(place)[1]["run_dir"]))
    kinds: dict[str, Path] = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_dir() or any(re.fullmatch(pattern, name) for pattern in NOT_READ):
            continue
        assert any(re.fullmatch(pattern, name) for pattern in GUARDED), f"a kind of file that nobody guards: {name}"
        if path.stat().st_size and (
            first.path in path.parents or re.match(r"store/nano3-tiny-sft/(v1|\.aliases)/", name)
        ):
            kinds[re.sub(r"(?<=code/nemotron_recipes/).*|(?<=content/).*", "", name)] = path
    assert len(kinds) >= 18, kinds
    assert "verified: its files" in nemotron(place, "runs", "show", first.path.name, "--verify")
    for path in kinds.values():
        whole, mode = path.read_bytes(), path.stat().st_mode
        path.chmod(0o644)
        for spoilt in (
            flipped(whole),
            *(() if path.name == CUT_IS_HARMLESS else (whole[: len(whole) // 2], whole.rstrip()[:-1])),
        ):
            path.write_bytes(spoilt)
            told = named(first)
            assert any(
                str(place) in told for place in (path, *path.parents) if place.name in (path.name, "nemotron_recipes")
            ), (path, told)
        path.write_bytes(whole)
        path.chmod(mode)
    assert named(first) == ""


def flipped(whole: bytes) -> bytes:
    """One digit, else one letter, in the middle is another one."""
    place = next(n for n in sorted(range(len(whole)), key=lambda n: abs(n - len(whole) // 2)) if whole[n] > 47)
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


def named(run: RunDir) -> str:
    """What is said to be wrong with a run and the model that it made."""
    store = Store(run.path.parents[1] / "store")
    found = [str(problem) for problem in damage(load_run(run.path))]
    try:
        store.verify(store.resolve("nano3-tiny-sft:best"))
    except UserError as error:
        found.append(str(error))
    return "\n".join(found)


def test_compare_shows_figures_and_draws_one_picture(place: Path) -> None:
    again, first = runs(place)
    found = json.loads(nemotron(place, "runs", "compare", first["id"], again["id"], "--json"))
    assert found["config"] == {}
    for run in found["runs"]:
        figures = run["stages"]["sft"]
        assert figures["state"] == "succeeded" and figures["exit_code"] == 0 and figures["steps"] == 2
        assert figures["wall_seconds"] > 0 and figures["seconds_per_step"] > 0 and figures["memory_bytes"] > 2**20
        assert figures["tokens_per_second"] > 0
    text = nemotron(place, "runs", "compare", first["id"], again["id"], "--plot", "both.svg")
    assert "STEP TIME" in text and "both.svg" in text
    nemotron(place, "runs", "tensorboard", first["id"])
    assert list((Path(first["run_dir"]) / "sft/metrics-tensorboard").glob("events.out.tfevents.*"))
    picture = (place / "both.svg").read_text()
    assert first["id"] in picture and again["id"] in picture and "loss" in picture


def test_a_rerun_that_could_not_be_the_same_is_refused(place: Path) -> None:
    first = runs(place)[1]
    source = Path(first["run_dir"]) / "code/nemotron_recipes/spec.py"
    manifest = place / "nemotron-output/store/nano3-tiny-sft-data/v1/artifact.json"
    was, text = source.read_bytes(), manifest.read_text()
    try:
        source.write_text("changed")
        manifest.write_text(text.replace(json.loads(text)["digest"], "sha256:other"))
        done = subprocess.run(
            [sys.executable, "-m", "nemotron_recipes", "rerun", first["id"]],
            cwd=place,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
    finally:
        source.write_bytes(was)
        manifest.write_text(text)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "copy of the code is missing or has changed" in done.stderr and "nemotron nano3 sft -c tiny" in done.stderr
    assert "data.path: the manifest of nano3-tiny-sft-data:v1 is damaged" in done.stderr
    assert len(runs(place)) == 2
