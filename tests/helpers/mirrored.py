"""Runs whose journals say what W&B is to be told, and FakeWandb to be told it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.mirror.journal import Journal, mark
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import Artifact, Producer
from tests.helpers.fake_wandb import KEY, FakeWandb

ROOT = Path(__file__).parents[2]
RAW = Artifact("path", "data", uri="/data/raw.jsonl", digest="sha256:" + "a" * 64)
TINY = Artifact("builtin", "model", "tiny")
STEPS = 5


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeWandb]:
    with FakeWandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "0.2")  # seconds; the SDK's own is 15
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
    lines = [{"step": n, "steps": STEPS, "loss": 1 / n if n != 2 else None} for n in range(1, STEPS + 1)]
    lines.append({"step": STEPS, "steps": STEPS, "validation_loss": 0.5})  # a row of its own for the same step
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage("sft", "model", "model", {"model.path": TINY, "data.path": rows})
    return journal


def whole(server: FakeWandb, run: str = "run-1", version: int = 0, group: str = "") -> None:
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
    assert math.isnan(history[1]["loss"]), "a loss that was no number is no gap"
    assert history[STEPS - 1]["validation_loss"] == 0.5 and history[STEPS - 1]["loss"] == 1 / STEPS
    for name in ("data-prep-sft", "sft"):
        told = server.runs[f"{run}.{name}"]
        assert told.complete and told.exit_code == 0 and told.group == (group or run) and told.job_type == name
    assert server.runs[f"{run}.sft"].summary["loss"] == 0.2
