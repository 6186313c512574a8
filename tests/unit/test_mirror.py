"""The mirror in W&B: the real SDK against FakeWandb. The same graph and curves, once, whatever interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.backends import megatron_bridge, schemas
from nemotron_recipes.errors import UserError
from nemotron_recipes.mirror import pull, sync
from nemotron_recipes.mirror.journal import Journal, mark, pending
from nemotron_recipes.rundir import RunDir, append_event
from nemotron_recipes.spec import Artifact, Producer
from nemotron_recipes.worker.trainer_wandb import TrainerRun, find_trainer_run
from tests.helpers.cli import nemotron
from tests.helpers.fake_wandb import KEY, FakeWandb

pytest.importorskip("wandb")
ROOT = Path(__file__).parents[2]
RAW = Artifact("path", "data", uri="/data/raw.jsonl", digest="sha256:" + "a" * 64)
TINY = Artifact("builtin", "model", "tiny")
STEPS = 5


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    with FakeWandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        yield server
        assert server.unknown == [], "the SDK made a call that nobody has looked at"


def a_run(output: Path, run: str = "run-1", **target: str) -> Journal:
    """data prep and sft of one run, as lifecycle and worker leave them."""
    store = Store(output / "store")
    journal = Journal(output / "runs" / run)
    config = {"optimizer": {"lr": 0.1}}
    stages = [{"name": n, "fingerprint": f"f-{n}", "config": config, "reused": None} for n in ("data-prep-sft", "sft")]
    plan = {
        "id": run,
        "title": "",
        "created": "2026-01-01",
        "store": str(store.root),
        "stages": stages,
        "code": {"digest": "sha256:c"},
    }
    journal.folder.mkdir(parents=True)
    RunDir(journal.run_dir).plan.write_text(json.dumps(plan))
    runs = {stage["name"]: f"{run}.{stage['name']}" for stage in stages}
    (journal.folder / "target.json").write_text(json.dumps({"entity": "team", "project": "p", "runs": runs, **target}))
    mark(output, run)

    def register(name: str, kind: str, stage: str, parents: dict[str, Artifact]) -> Artifact:
        staged = store.stage(name)
        (staged.content / "x").write_text(f"{name} of {run}")
        producer = Producer(f"f-{stage}", run, stage, kind)
        return store.commit(staged, kind=kind, producer=producer, parents=parents, metadata={"tokens": 12})

    def stage(name: str, made: str, kind: str, parents: dict[str, Artifact]) -> Artifact:
        journal.started(name, 1, [{"input": key, **asdict(parent)} for key, parent in parents.items()])
        artifact = register(made, kind, name, parents)
        journal.output(name, kind, made, artifact.version or 0)
        journal.ended(name, 1, "succeeded", 0, {"loss": 0.2})
        return artifact

    rows = stage("data-prep-sft", "rows", "data", {"data.sources.0.path": RAW})
    metrics = RunDir(journal.run_dir).stage("sft").metrics
    metrics.parent.mkdir()
    lines = [{"step": n, "steps": STEPS, "loss": 1 / n} for n in range(1, STEPS + 1)]
    lines.append({"step": STEPS, "steps": STEPS, "validation_loss": 0.5})  # a row of its own for the same step
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage("sft", "model", "model", {"model.path": TINY, "data.path": rows})
    return journal


def whole(server: FakeWandb, run: str = "run-1", version: int = 0) -> None:
    """W&B shows the run: its graph, its curve with every step once, its end."""
    rows, model = f"DataBlendsArtifact-sft:v{version}", f"ModelArtifact-sft:v{version}"
    expected = {
        ("used", f"{run}.data-prep-sft", "path-raw.jsonl:v0"),
        ("made", f"{run}.data-prep-sft", rows),
        ("used", f"{run}.sft", "builtin-model-tiny:v0"),
        ("used", f"{run}.sft", rows),
        ("made", f"{run}.sft", model),
    }
    assert {edge for edge in server.edges() if edge[1].startswith(run)} == expected
    history = server.runs[f"{run}.sft"].history
    assert [history[n]["_step"] for n in sorted(history)] == list(range(1, STEPS + 1))
    assert history[STEPS - 1]["validation_loss"] == 0.5 and history[STEPS - 1]["loss"] == 1 / STEPS
    for name in ("data-prep-sft", "sft"):
        told = server.runs[f"{run}.{name}"]
        assert told.complete and told.exit_code == 0 and told.group == run and told.job_type == name
    assert server.runs[f"{run}.sft"].summary["loss"] == 0.2


def test_a_run_is_mirrored_once_and_runs_share_versions(wandb: FakeWandb, tmp_path: Path) -> None:
    journal = a_run(tmp_path)
    outcome = sync.replay(journal.run_dir)
    assert (outcome.told, outcome.left, outcome.why) == (6, 0, "")
    whole(wandb)
    model = wandb.named("ModelArtifact-sft:v0")
    assert [alias for alias in model.aliases if alias.startswith("model.v1.")]
    facts = json.loads(model.metadata)
    store = Store(tmp_path / "store")
    assert facts["digest"] == store.resolve("model").digest and facts["uri"] == store.resolve("model").uri
    assert facts["metadata"] == {"tokens": 12} and "latest" in model.aliases
    assert wandb.runs["run-1.sft"].config["optimizer"] == {"value": {"lr": 0.1}}
    requests = len(wandb.artifacts)
    journal.done_file.unlink()  # as if no acknowledgement had ever reached the disk
    assert sync.replay(journal.run_dir).left == 0
    whole(wandb)
    assert len(wandb.artifacts) == requests, "told twice is told once"

    again = a_run(tmp_path, "run-2")
    store.alias("model", "best", 2)
    assert sync.replay(again.run_dir).left == 0
    whole(wandb, "run-2", version=1)
    assert wandb.named("ModelArtifact-sft:best").number == 1
    assert not any(b"x of" in blob for blob in wandb.blobs.values()), "references, no uploads"


@pytest.mark.parametrize("of", [2, pytest.param(1000, marks=pytest.mark.long)], ids=["some", "all"])
def test_a_lost_answer_or_a_killed_process_at_a_request(wandb: FakeWandb, tmp_path: Path, of: int) -> None:
    """The connection is cut when W&B has done what it was asked, or the process dies: at each request in turn."""
    reference = a_run(tmp_path / "reference")
    sync.replay(reference.run_dir)
    count = len(wandb.asked)
    points = range(max(1, count // (of + 1)), count, max(1, count // (of + 1)))
    for number, point in enumerate(points[:of]):
        journal = a_run(tmp_path / f"cut-{point}", f"run-{point}")
        if number % 2:
            wandb.cut_at = point
        else:
            _kill_at(wandb, journal, point)
        outcomes = [sync.replay(journal.run_dir) for _ in range(2)]
        assert (outcomes[-1].left, outcomes[-1].why) == (0, ""), f"request {point}: {outcomes}"
        edges = {edge[:2] for edge in wandb.edges() if edge[1].startswith(f"run-{point}.")}
        assert len(edges) == 4, f"request {point}"
        history = wandb.runs[f"run-{point}.sft"].history
        assert [history[n]["_step"] for n in sorted(history)] == list(range(1, STEPS + 1)), f"request {point}"


def _kill_at(server: FakeWandb, journal: Journal, point: int) -> None:
    """SIGKILL a replay, its SDK's service included, when the server has had `point` requests more."""
    process = subprocess.Popen([sys.executable, "-m", sync.MODULE, str(journal.run_dir)], start_new_session=True)
    server.wait_for(point, process)
    with suppress(ProcessLookupError):  # it was done already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"down": True}, ""),
        ({"refuse_key": True}, "credentials"),
        pytest.param({"delay": 60.0}, "did not answer for 3 s", marks=pytest.mark.long),
    ],
)
def test_wandb_that_fails_leaves_the_journal_for_later(
    wandb: FakeWandb, tmp_path: Path, fault: dict[str, Any], text: str
) -> None:
    journal = a_run(tmp_path)
    for name, value in fault.items():
        setattr(wandb, name, value)
    outcome = sync.replay(journal.run_dir, stall=60 if "refuse_key" in fault else 3)
    assert outcome.left == 6 and outcome.why and text in outcome.why
    assert KEY not in outcome.why
    for name in fault:
        setattr(wandb, name, False if name != "delay" else 0.0)
    assert sync.replay(journal.run_dir).left == 0
    whole(wandb)


def test_a_run_that_wandb_refuses_holds_up_only_what_reads_it(wandb: FakeWandb, tmp_path: Path) -> None:
    refused, reader, free = (a_run(tmp_path, f"run-{n}") for n in (1, 2, 3))
    for number, journal in enumerate((refused, reader, free), 1):
        os.utime(journal.run_dir / "plan.json", (number, number))
    rows = Store(tmp_path / "store").resolve("rows:v1")
    reader.started("sft", 2, [{"input": "data.path", **asdict(rows)}])
    wandb.refuse = ("CreateArtifact", "run-1.")
    told = {outcome.run: outcome for outcome in sync.replay_all(tmp_path)}
    assert told["run-1"].why.startswith("output rows:v1: ") and "storage quota exceeded" in told["run-1"].why
    assert refused.missing()[0]["key"] == "output rows:v1" and told["run-1"].left == 5, "it stays for the next time"
    assert told["run-2"].why == "waits for run-1, which made what it reads" and not reader.done()
    assert (told["run-3"].why, told["run-3"].left) == ("", 0)
    whole(wandb, "run-3")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux says what a process has written")
def test_traffic_is_progress_and_so_is_an_acknowledgement(tmp_path: Path) -> None:
    """By the clock that the test gives: an upload goes on for longer than anything is acknowledged."""
    journal = a_run(tmp_path)
    line = "import sys\nfor n in sys.stdin: print('x' * int(n), flush=True)"
    child = subprocess.Popen(
        [sys.executable, "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert child.stdin is not None and child.stdout is not None

    def writes(count: int) -> None:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b"%d\n" % count)
        child.stdin.flush()
        child.stdout.readline()

    try:
        writes(1)
        progress = sync.Progress(child.pid, journal, 120.0, now=0.0)
        for now in (100.0, 200.0, 300.0):
            writes(sync.LEAST_TRAFFIC * 120)
            assert not progress.is_over(now)
        writes(5000)  # it asks once more
        assert not progress.is_over(419.0)
        journal.acknowledge("started sft 1")
        assert not progress.is_over(419.5) and not progress.is_over(539.0)
        writes(5000)
        assert progress.is_over(540.0)
    finally:
        child.stdin.close()
        child.wait()
        child.stdout.close()


def test_where_nobody_is_answered_the_rest_is_not_tried(wandb: FakeWandb, tmp_path: Path) -> None:
    for n in (1, 2):
        a_run(tmp_path, f"run-{n}")
    wandb.refuse_key = True
    first, second = sync.replay_all(tmp_path)
    assert "credentials" in first.why and (second.told, second.left, second.why) == (0, 6, "not tried")


def test_the_next_command_tells_wandb_what_is_left(wandb: FakeWandb, tmp_path: Path) -> None:
    output = tmp_path / "nemotron-output"
    append_event(RunDir(a_run(output).run_dir).events, "finished", state="failed", stage=None, cause="x")
    nemotron(tmp_path, "artifacts", "list")
    until = time.monotonic() + 180
    while pending(output) and time.monotonic() < until:  # the process that nobody waits for says so at its end
        time.sleep(0.1)
    assert pending(output) == []
    whole(wandb)


def test_without_a_key_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    journal = a_run(tmp_path)
    assert not sync.can_reach(os.environ) and not sync.in_background(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    outcome = sync.replay(journal.run_dir)
    assert outcome.left == 6 and "api_key" in outcome.why.lower().replace("api key", "api_key"), outcome
    assert pending(tmp_path) == ["run-1"]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert sync.can_reach(os.environ) and not sync.can_reach({**os.environ, "WANDB_MODE": "offline"})


def test_an_artifact_that_only_wandb_has_becomes_a_version_once(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = a_run(tmp_path / "elsewhere", upload="files")
    assert sync.replay(origin.run_dir).why == ""
    model = Store(tmp_path / "elsewhere/store").resolve("model")
    pinned = pull.describe("team/p/ModelArtifact-sft:latest", "model")
    assert (pinned.label, bool(pinned.digest)) == ("wandb:team/p/ModelArtifact-sft:v0", True)
    store = Store(tmp_path / "here")
    found = pull.ensure(store, pinned, download=True)
    store.verify(found)
    assert found.digest == model.digest and store.describe(found)["metadata"]["wandb"] == "team/p/ModelArtifact-sft:v0"
    asked = len(wandb.asked)
    assert pull.ensure(store, pinned, download=True) == found and len(wandb.asked) == asked, "downloaded once"
    with pytest.raises(UserError, match="isn't what was planned"):
        pull.ensure(store, replace(pinned, digest="other"), download=True)
    blob = next(name for name, data in wandb.blobs.items() if data == b"model of run-1")
    wandb.blobs[blob] = b"model of run-2"
    with pytest.raises(UserError):
        pull.ensure(Store(tmp_path / "third"), pinned, download=True)
    assert Store(tmp_path / "third").names() == []


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    class Found:
        manifest = type("Manifest", (), {"entries": {name: None}})

    with pytest.raises(ValueError, match="leads out"):
        pull._download(Found(), tmp_path)


TRAINER = """
import sys, wandb
run = wandb.init(dir=None, name="my own name", config={"hidden_size": 8}, settings=wandb.Settings(silent=True))
first, end = map(int, sys.argv[1:])
for step in range(first, end):
    wandb.log({"lm loss": first / step, "large": "x" * 40_000, "spread": wandb.Histogram([1, 2])}, step)
    wandb.log({"learning-rate": 0.1, "answers": wandb.Table(["a"], [["b"]])}, step)
print("spoken on the console")
wandb.finish()
"""


# As transformers' WandbCallback and TRL's GRPO do: the SDK counts the calls, anew in each attempt.
UNNUMBERED = """
import sys, wandb
run = wandb.init(project="huggingface")
first, end = map(int, sys.argv[1:])
for step in range(first, end):
    wandb.log({"lm loss": first / step, "train/global_step": step})
    wandb.log({"answers": wandb.Table(["a"], [[f"answer {step}"]])})
"""


def trainer_logs(journal: Journal, first: int, end: int, script: str = TRAINER) -> TrainerRun:
    """What a trainer that opens a W&B run as Megatron-Bridge does leaves in the stage's folder, without any network."""
    found = find_trainer_run(RunDir(journal.run_dir).stage("sft"), "run-1", "sft")
    assert found is not None
    environ = {**os.environ, **found.environment, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "-c", script, str(first), str(end)], env=environ, check=True, timeout=300)
    return found


@pytest.mark.parametrize("cuts", [1, pytest.param(8, marks=pytest.mark.long)])
def test_a_trainers_own_logging_goes_to_the_run_of_its_stage(wandb: FakeWandb, tmp_path: Path, cuts: int) -> None:
    journal = a_run(tmp_path)
    found = trainer_logs(journal, 1, 5)
    trainer_logs(journal, 3, 8)  # a second attempt goes on from the checkpoint at step 2
    kept = [path for path in found.folder.rglob("*") if path.is_file()]
    assert kept and not any(KEY.encode() in path.read_bytes() for path in kept)
    assert not any(b"spoken on the console" in path.read_bytes() for path in kept)
    for cut in range(cuts):
        wandb.cut_at = 20 + 4 * cut
        sync.replay(journal.run_dir)
    wandb.cut_at = None
    assert sync.replay(journal.run_dir).left == 0
    told = wandb.runs["run-1.sft"]
    steps = [told.history[n]["_step"] for n in sorted(told.history)]
    assert steps == list(range(1, 8))
    losses = [told.history[n]["lm loss"] for n in sorted(told.history)]
    assert losses == [1.0, 0.5, *(3 / step for step in range(3, 8))], "of a step that is repeated the newest counts"
    assert not any("loss" in row for row in told.history.values()), "metrics.jsonl holds the same under other names"
    assert told.history[0]["spread"]["_type"] == "histogram" and told.history[0]["answers"]["_type"] == "table-file"
    assert {"lm loss", "learning-rate"} <= told.history[0].keys() and told.config["hidden_size"] == {"value": 8}
    assert told.summary["loss"] == 0.2 and told.exit_code == 0
    assert set(wandb.runs) == {"run-1.sft", "run-1.data-prep-sft"}
    assert ("made", "run-1.sft", "ModelArtifact-sft:v0") in wandb.edges()


def test_what_wandb_has_of_a_repeated_step_stays(wandb: FakeWandb, tmp_path: Path) -> None:
    """The first attempt was told before the second one came."""
    journal = a_run(tmp_path)
    trainer_logs(journal, 1, 6, UNNUMBERED)
    assert sync.replay(journal.run_dir).left == 0
    journal.started("sft", 2, [])
    found = trainer_logs(journal, 4, 9, UNNUMBERED)
    newest = sorted(found.folder.glob("wandb/offline-run-*"))[-1]
    next(newest.glob("files/media/table/answers_5_*")).unlink()
    journal.ended("sft", 2, "succeeded", 0, {"loss": 0.1})
    assert sync.replay(journal.run_dir).left == 0
    told = wandb.runs["run-1.sft"].history
    assert [told[n]["_step"] for n in sorted(told)] == list(range(1, 9))
    assert [told[n]["lm loss"] for n in sorted(told)] == [*(1 / n for n in range(1, 6)), *(4 / n for n in range(6, 9))]
    assert [told[n]["_step"] for n in sorted(told) if "answers" not in told[n]] == [6], "its file is gone"
    assert [entry.get("left_out") for entry in journal.done().values()][-1] == ["answers"], "and that is said"
    assert any(b"answer 8" in blob for blob in wandb.blobs.values())


def test_an_end_waits_for_the_trainers_last_words(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker notes its end first; then its process goes on for a moment, and the SDK writes."""
    from nemotron_recipes.mirror.offline import OfflineFile
    from nemotron_recipes.mirror.telling import Teller

    journal = a_run(tmp_path)
    found = trainer_logs(journal, 1, 8)
    (file,) = found.folder.glob("wandb/offline-run-*/*.wandb")
    whole = file.read_bytes()
    growing, now = OfflineFile(file.with_name("growing")), 0
    for size in (3, 7, 100, 5_000, 40_000, 70_001, 70_002, len(whole)):  # read on while it grows, then at its end
        growing.path.write_bytes(whole[:size])
        now = len(growing.read(ended=False).rows)
    assert growing.logged == OfflineFile(file).read() and growing.logged.whole and now == 7
    growing.path.unlink()
    file.write_bytes(whole[: len(whole) * 6 // 10])
    part = OfflineFile(file).read()
    assert not part.whole and 1 < len(part.rows) < 7
    fake_sdk = type("FakeSdk", (), {"Api": lambda timeout: None})  # nothing is asked of it here
    assert journal.target is not None
    replay, end = Teller(fake_sdk, journal.run_dir, journal.target), journal.entries()[-1]
    assert replay._more_comes(end, alive=True) and replay._more_comes(end, alive=False), "it was changed just now"
    with monkeypatch.context() as patched:
        patched.setattr("nemotron_recipes.mirror.telling.QUIET_SECONDS", 0.0)
        assert not replay._more_comes(end, alive=False), "killed: no end will come"
    worker = subprocess.Popen(["sleep", "600"])
    follower = subprocess.Popen([sys.executable, "-m", sync.FOLLOWER, str(journal.run_dir), str(worker.pid)])
    try:
        until = time.monotonic() + 180
        while "output model:v1" not in journal.done() and time.monotonic() < until:
            time.sleep(0.05)
        assert "output model:v1" in journal.done() and follower.poll() is None
        while not wandb.runs["run-1.sft"].history and time.monotonic() < until:
            time.sleep(0.05)
        assert wandb.runs["run-1.sft"].history and not wandb.runs["run-1.sft"].complete, "the curve while it trains"
        file.write_bytes(whole)
        assert not replay._more_comes(end, alive=True)
        worker.kill()
        worker.wait()
        assert follower.wait(timeout=180) == 0
    finally:
        for process in (worker, follower):
            process.kill()
            process.wait()
    told = wandb.runs["run-1.sft"].history
    assert [told[n]["_step"] for n in sorted(told)] == list(range(1, 8))


def test_the_native_keys_are_keys_of_the_real_trainers(wandb: FakeWandb, tmp_path: Path) -> None:
    """Megatron-Bridge's LoggerConfig as it was read from the package; what `wandb.init` takes, where AutoModel goes."""
    import inspect

    import wandb as sdk

    journal = a_run(tmp_path)
    found = find_trainer_run(RunDir(journal.run_dir).stage("sft"), "run-1", "sft")
    assert found is not None
    for name in megatron_bridge.SCHEMAS:
        fields = schemas.load(name).fields
        assert all(f"logger.{key}" in fields for key in found.megatron_bridge()), name
    assert found.megatron_bridge()["wandb_exp_name"] == "run-1.sft", "an empty name is an error there"
    assert found.automodel().keys() <= inspect.signature(sdk.init).parameters.keys()
    settings = {name.removeprefix("WANDB_").lower() for name in found.environment} - {"name", "dir"}
    known = sdk.Settings.model_fields.keys()
    other = {"error_reporting", "run_group", "job_type", "run_id", "project", "entity", "resume", "mode"}
    other |= {"log_model", "watch"}  # transformers' own
    assert settings - other <= known, settings - other - known
    (journal.folder / "target.json").unlink()
    assert find_trainer_run(RunDir(journal.run_dir).stage("sft"), "run-1", "sft") is None
