"""What can go: never what something kept descends from; quarantine first, and a way back."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.gc import Item, Kept, Policy, find, purge, quarantine, quarantined, restore
from nemotron_recipes.artifacts.records import RunView, load_run
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import UserError
from nemotron_recipes.rundir import TRACKER, RunDir, append_event, write_record, write_sealed
from nemotron_recipes.spec import Artifact, Producer
from tests.helpers.cli import nemotron

NOTHING = Kept(frozenset(), frozenset())
LATER = 4e9  # everything is old by then


def register(store: Store, name: str, **parents: Artifact) -> Artifact:
    staged = store.stage(name)
    (staged.content / "x").write_text(f"{name} {len(store.versions(name))}")
    producer = Producer(f"f-{name}", "run-1", "sft", "model")
    return store.commit(staged, kind="model", producer=producer, parents=parents)


def going(store: Store, runs: list[RunView] | None = None, keep: int = 1, older_than: float = 0) -> list[str]:
    return sorted(item.what for item in find(store, runs or [], Policy(keep, older_than), LATER)[0])


def test_ancestors_aliases_the_newest_and_the_young_stay(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [register(store, "rows") for _ in range(4)]
    sft = [register(store, "sft", data=rows[n]) for n in (0, 1, 1)]
    register(store, "rl", model=sft[1], data=rows[2])
    # rl:v1 <- sft:v2 <- rows:v2, rl:v1 <- rows:v3; sft:v3 and rows:v4 are the newest
    assert going(store) == ["rows:v1", "sft:v1"]
    assert going(store, keep=3) == []
    assert going(store, older_than=2 * LATER) == []
    store.alias("sft", "best", 1)
    assert going(store) == [], "sft:v1 has a name now, and rows:v1 is what it was made from"


def test_what_a_run_that_goes_on_reads_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = register(store, "rows")
    register(store, "rows")
    assert going(store) == ["rows:v1"]
    run = RunDir(tmp_path / "run")
    pinned = {"source": "store", "name": first.name, "version": first.version}
    stage = {"name": "sft", "reused": None, "fingerprint": "f", "inputs": {"data.path": pinned}}
    run.path.mkdir()
    run.plan.write_text(json.dumps({"id": "r", "title": "", "created": "2026-01-01", "stages": [stage]}))
    assert going(store, [load_run(run.path)]) == []
    append_event(run.events, "finished", state="failed", stage=None, cause="x")
    assert going(store, [load_run(run.path)]) == ["rows:v1"]


def test_old_checkpoints_of_a_stage_that_succeeded_but_the_last_and_what_a_model_started_from(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    run = RunDir(tmp_path / "runs" / "r")
    stage = run.stage("sft")
    for step in (1, 2, 3):
        (stage.checkpoints / f"iter_{step:07d}").mkdir(parents=True)
        (stage.checkpoints / f"iter_{step:07d}" / "w").write_bytes(bytes(100 * step))
    (stage.checkpoints / TRACKER).write_text("3\n")
    planned = {"name": "sft", "reused": None, "fingerprint": "f", "inputs": {}}
    run.plan.write_text(json.dumps({"id": "r", "title": "", "created": "2026-01-01", "stages": [planned]}))
    assert going(store, [load_run(run.path)]) == [], "it may go on"
    ended = {"attempt": 1, "exit_code": 0, "started": 1.0, "ended": 2.0, "parents": [], "outputs": {}, "results": {}}
    write_record(stage, {"state": "succeeded", **ended})
    assert going(store, [load_run(run.path)]) == ["r/sft/iter_0000001", "r/sft/iter_0000002"]
    uri = str(stage.checkpoints / "iter_0000002")
    register(store, "model", load=Artifact("path", "checkpoint", uri=uri, digest="sha256:x"))
    assert going(store, [load_run(run.path)]) == ["r/sft/iter_0000001"]


def test_quarantine_restore_and_deletion(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        register(store, "rows")
    found, kept = find(store, [], Policy(1, 0), LATER)
    assert [item.what for item in quarantine(store.root, found, now=100.0)[0]] == ["rows:v1"]
    assert store.versions("rows") == [2] and store.names() == ["rows"]
    assert quarantine(store.root, found, now=100.0) == ([], []), "it is gone already"
    assert store.find("f-rows", "model", "rows").version == 2  # type: ignore[union-attr]
    assert purge(store.root, 100.0, kept) == ([], [])
    restore(store.root, "rows:v1")
    store.verify(store.resolve("rows:v1"))
    with pytest.raises(UserError, match="holds: nothing"):
        restore(store.root, "rows:v1")
    quarantine(store.root, found, now=100.0)
    assert purge(store.root, 101.0, kept) == (["rows:v1"], [])
    assert list((tmp_path / ".quarantine").iterdir()) == []
    assert register(store, "rows").version == 3, "a number is never given twice"


def test_a_checkpoint_on_another_file_system_waits_beside_its_place(tmp_path: Path, monkeypatch: Any) -> None:
    """A rename that crosses file systems is refused by the kernel, which is what the real call says here."""
    checkpoint = tmp_path / "checkpoints" / "iter_0000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "w").write_bytes(b"w")
    item = Item("r/sft/iter_0000001", str(checkpoint), 1, "old")
    root, real = tmp_path / "store", os.rename

    def rename(source: str, target: str) -> None:
        if str(target).startswith(str(root)) != str(source).startswith(str(root)):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert quarantine(root, [item], 100.0) == ([item], [])
    assert not checkpoint.exists() and [held["what"] for _, held in quarantined(root)] == [item.what]
    assert restore(root, item.what) == item
    assert (checkpoint / "w").read_bytes() == b"w" and list(checkpoint.parent.iterdir()) == [checkpoint]
    quarantine(root, [item], 100.0)
    assert purge(root, 101.0, NOTHING) == ([item.what], [])
    assert list(checkpoint.parent.iterdir()) == []


@pytest.mark.parametrize("begun", [False, True])
def test_what_lies_on_a_file_system_that_is_away_is_not_forgotten(tmp_path: Path, begun: bool) -> None:
    disk, root = tmp_path / "disk", tmp_path / "store"
    place, content = root / ".quarantine" / "p", disk / "checkpoints" / ".quarantine-p"
    content.mkdir(parents=True)
    item = Item("r/sft/iter_0000001", str(disk / "checkpoints" / "iter_0000001"), 1, "old")
    tree = {**asdict(item), "quarantined": 1.0, "content": str(content), **({"deleting": True} if begun else {})}
    write_sealed(place / "item.json", tree, "item")
    disk.rename(tmp_path / "away")
    gone, left = purge(root, 100.0, NOTHING)
    assert gone == [] and len(left) == begun and (place / "item.json").exists()
    (tmp_path / "away").rename(disk)
    if begun:
        assert purge(root, 100.0, NOTHING) == ([item.what], []) and not content.exists()
    else:
        assert restore(root, item.what) == item


def test_what_can_not_be_reached_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    """A stale handle of a network file system is an error of its own to the real call."""
    (tmp_path / "thing").mkdir()
    quarantine(tmp_path / "store", [Item("x", str(tmp_path / "thing"), 1, "old")], 1.0)
    real = Path.exists

    def stale(path: Path) -> bool:
        if path.name == "content":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return real(path)

    monkeypatch.setattr(Path, "exists", stale)
    gone, left = purge(tmp_path / "store", 100.0, NOTHING)
    assert gone == [] and "Stale file handle" in left[0].why


def test_what_can_not_be_moved_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        register(store, "rows")
    (tmp_path / ".quarantine").write_text("a file where the folder should be")
    moved, left = quarantine(tmp_path, find(store, [], Policy(1, 0), LATER)[0], 1.0)
    assert moved == [] and [each.what for each in left] == ["rows:v1"] and "can't be moved" in left[0].why
    assert store.versions("rows") == [1, 2]


def test_a_purge_that_was_cut_off_is_gone_on_with(tmp_path: Path, monkeypatch: Any) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        register(store, "rows")
    quarantine(tmp_path, find(store, [], Policy(1, 0), LATER)[0], now=100.0)
    real = shutil.rmtree

    def half(folder: Path, *_: Any, **__: Any) -> None:
        os.unlink(Path(folder) / "artifact.json")
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(shutil, "rmtree", half)
    gone, left = purge(tmp_path, 101.0, NOTHING)
    assert gone == [] and left[0].what == "rows:v1" and "Input/output error" in left[0].why
    monkeypatch.setattr(shutil, "rmtree", real)
    assert quarantined(tmp_path) == []
    with pytest.raises(UserError, match="not in quarantine"):
        restore(tmp_path, "rows:v1")
    assert purge(tmp_path, 0.0, NOTHING) == (["rows:v1"], []), "however young: it was begun"
    assert list((tmp_path / ".quarantine").iterdir()) == []


def test_what_is_needed_again_is_not_deleted(tmp_path: Path) -> None:
    """A run that was planned before the quarantine registers a model made from what lies there now."""
    store = Store(tmp_path)
    source = register(store, "source")
    rows = [register(store, "rows", data=source), register(store, "rows")]
    register(store, "source")
    quarantine(tmp_path, find(store, [], Policy(1, 0), LATER)[0], now=100.0)
    assert store.versions("rows") == [2] and store.versions("source") == [2]
    register(store, "sft", data=rows[0])
    _, kept = find(store, [], Policy(1, 0), LATER)
    gone, left = purge(tmp_path, 101.0, kept)
    assert gone == [] and sorted(each.what for each in left) == ["rows:v1", "source:v1"]
    for each in left:
        restore(tmp_path, each.what)
    store.verify(store.resolve("rows:v1"))


def test_a_damaged_manifest_stops_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        register(store, "rows")
    (tmp_path / "rows/v1/artifact.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        find(store, [], Policy(1, 0), LATER)


def test_the_command(tmp_path: Path) -> None:
    store = Store(tmp_path / "nemotron-output/store")
    for _ in range(2):
        register(store, "rows")
    wanted = ("--keep", "1", "--older-than", "0")
    assert "rows:v1" in nemotron(tmp_path, "gc", "--dry-run", *wanted) and store.versions("rows") == [1, 2]
    told = json.loads(nemotron(tmp_path, "gc", "--json", *wanted))
    assert [item["what"] for item in told["items"]] == ["rows:v1"] and store.versions("rows") == [2]
    nemotron(tmp_path, "gc", "--restore", "rows:v1")
    assert store.versions("rows") == [1, 2]
