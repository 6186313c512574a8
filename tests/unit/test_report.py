"""report.md and release notes: complete, and nothing in them acts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from nemotron_recipes.artifacts.lineage import lineage
from nemotron_recipes.artifacts.records import RunView, load_run
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.report.compare import comparison
from nemotron_recipes.report.document import _run_section, release_notes, report
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import Artifact, Producer

EVIL = "<img src=x>`|[x](y)\x1b[2J"


def register(store: Store, name: str, kind: str, loss: float, rows: int = 0, **parents: Artifact) -> Artifact:
    staged = store.stage(name)
    (staged.content / "x").write_text(f"{name} {loss}")
    (staged.content / "data-card.md").write_text("# Where it is from\nFrom a farm.\n")
    producer = Producer(f"f-{name}", "run-1", "sft", kind)
    results = {"loss": loss, EVIL: 1.0}
    return store.commit(
        staged, kind=kind, producer=producer, parents=parents, results=results, metadata={"splits": {"train": rows}}
    )


def test_a_report_tells_results_data_and_lineage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = register(store, "rows", "data", 0.0, rows=12)
    model = register(store, "model", "model", 0.25, data=rows)
    text = report(store, model, lineage(store, model), None, curves=True)
    for part in ("# model:v1", "| loss | 0.25 |", "## Data: rows:v1", "splits.train | 12", "### Where it is from"):
        assert part in text
    assert "![metrics over steps](curves.svg)" in text and "graph LR" in text and "run run-1 is not here" in text
    assert "\x1b" not in text and "<img" not in text


def test_release_notes_tell_what_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [register(store, "rows", "data", loss, rows=n) for loss, n in ((0.0, 12), (0.1, 20))]
    old = register(store, "model", "model", 0.5, data=rows[0])
    new = register(store, "model", "model", 0.25, data=rows[1])
    text = release_notes(store, old, new, (None, None))
    assert "# model:v2, compared with model:v1" in text and "| loss | 0.5 | 0.25 | -0.25 |" in text
    assert "| splits.train | 12 | 20 | +8 |" in text and "rows:v1 -&#62; rows:v2" in text.replace("->", "-&#62;")
    assert "<img" not in text


def a_run(root: Path, name: str, **configs: float) -> RunView:
    """A run with a stage a config."""
    run = RunDir(root / name)
    run.path.mkdir()
    common = {"reused": None, "changed": {}, "inputs": {}, "fingerprint": "f", "placement": {"executor": "local"}}
    stages = [{"name": stage, "config": {"optimizer": {"lr": lr}}, **common} for stage, lr in configs.items()]
    run.plan.write_text(json.dumps({"id": name, "title": name, "created": "2026-01-01", "stages": stages}))
    return load_run(run.path)


def test_only_stages_that_do_the_same_are_compared(tmp_path: Path) -> None:
    """The stage that made a version, whatever else its run did; of several runs those that all of them have."""
    store = Store(tmp_path / "store")
    old, new = (register(store, "model", "model", loss) for loss in (0.5, 0.25))
    views = a_run(tmp_path, "pipe", prep=1.0, sft=0.5), a_run(tmp_path, "alone", sft=0.125)
    text = release_notes(store, old, new, views)
    assert "| optimizer.lr | 0.5 | 0.125 |" in text and "prep" not in text
    assert comparison(views)["config"] == {"sft.optimizer.lr": [0.5, 0.125]}


def test_a_run_tells_the_command_that_was_typed() -> None:
    request = {"mode": "batch", "profile": "h100", "overrides": ["a.b=[1, 2]"]}
    view = RunView("r", "/r", "nano3 sft -c tiny", "", "failed", (), {"request": request, "stages": []})
    assert view.command == "nemotron nano3 sft -c tiny --batch h100 'a.b=[1, 2]'"
    assert "h100" in "\n".join(_run_section(view, "sft"))
    assert replace(view, plan={}).command == "nemotron nano3 sft -c tiny"
