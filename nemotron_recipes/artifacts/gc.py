"""What the store and the run folders can do without, and a quarantine on the way out.

Kept, always: the newest versions of a name, versions with an alias, what a run that goes on reads, and everything that
any kept version descends from. `find` only reads; `quarantine` renames, so that a wrong choice can be taken back with
`restore` until `purge` deletes.

    <root>/.quarantine/<id>/item.json     where it came from, when, why
    <root>/.quarantine/<id>/content       the version, or the checkpoint
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import files_below, fsync_folder, write_atomic
from nemotron_recipes.rundir import RunDir, latest_checkpoint, read_json
from nemotron_recipes.spec import Tree

ENDED = ("succeeded", "failed", "cancelled", "lost")


@dataclass(frozen=True)
class Item:
    """Something that can go. what: NAME:vN, or the checkpoint's run, stage and step; size in bytes."""

    what: str
    path: str
    size: int
    why: str


@dataclass(frozen=True)
class Policy:
    """keep: newest versions of each name; older_than: seconds since it was made, younger things stay."""

    keep: int = 3
    older_than: float = 30 * 24 * 3600.0


def find(store: Store, runs: Iterable[RunView], policy: Policy, now: float) -> list[Item]:
    """Everything that can go, largest first. UserError: a damaged manifest, whose ancestors nobody knows."""
    views = list(runs)
    manifests = {
        (name, version): store.describe(store.resolve(f"{name}:v{version}"))
        for name in store.names()
        for version in store.versions(name)
    }
    kept, folders = _kept(store, manifests, views, policy, now)
    items = [
        Item(
            f"{name}:v{version}",
            str(store.root / name / f"v{version}"),
            manifest["size"],
            "nothing that is kept descends from it",
        )
        for (name, version), manifest in manifests.items()
        if (name, version) not in kept
    ]
    items += [item for view in views for item in _checkpoints(view, folders, policy, now)]
    return sorted(items, key=lambda item: (-item.size, item.what))


def quarantine(root: Path, items: Iterable[Item], now: float) -> list[Item]:
    """Move items out of sight; those that are on another file system or have gone are left out. Returns what moved."""
    moved = []
    for item in items:
        place = root / ".quarantine" / uuid.uuid4().hex
        place.mkdir(parents=True)
        write_atomic(place / "item.json", json.dumps({**asdict(item), "quarantined": now}, indent=2))
        try:
            os.rename(item.path, place / "content")
        except OSError:
            shutil.rmtree(place)
            continue
        fsync_folder(Path(item.path).parent)
        fsync_folder(place)
        moved.append(item)
    return moved


def quarantined(root: Path) -> list[tuple[Path, Tree]]:
    """(folder, its item.json) of everything in quarantine."""
    folder = root / ".quarantine"
    found = [(path, read_json(path / "item.json")) for path in (sorted(folder.iterdir()) if folder.is_dir() else ())]
    return [(path, item) for path, item in found if item is not None and (path / "content").exists()]


def restore(root: Path, what: str) -> Item:
    """Bring something back to where it was. UserError: it isn't in quarantine, or its place is taken."""
    for place, item in quarantined(root):
        if item["what"] == what:
            if Path(item["path"]).exists():
                raise UserError(Problem(f"there is something at {item['path']} again", str(place)))
            Path(item["path"]).parent.mkdir(parents=True, exist_ok=True)
            os.rename(place / "content", item["path"])
            fsync_folder(Path(item["path"]).parent)
            shutil.rmtree(place)
            item.pop("quarantined")
            return Item(**item)
    held = ", ".join(item["what"] for _, item in quarantined(root)) or "nothing"
    raise UserError(Problem(f"'{what}' is not in quarantine", str(root / ".quarantine"), f"it holds: {held}"))


def purge(root: Path, before: float) -> list[str]:
    """Delete what was quarantined before that time; what it was."""
    gone = []
    for place, item in quarantined(root):
        if item["quarantined"] < before:
            shutil.rmtree(place)
            gone.append(str(item["what"]))
    return gone


def _kept(
    store: Store, manifests: dict[tuple[str, int], Tree], views: list[RunView], policy: Policy, now: float
) -> tuple[set[tuple[str, int]], set[str]]:
    """(versions that stay, folders that kept versions were made from or that runs which go on will read)"""
    wanted: list[tuple[str, int]] = []
    folders: set[str] = set()
    for name in store.names():
        versions, named = store.versions(name), store.aliases(name).values()
        wanted += [(name, version) for version in {*versions[-max(1, policy.keep) :], *named}]
    wanted += [key for key, manifest in manifests.items() if now - manifest["created"] < policy.older_than]
    for view in views:
        if view.state not in ENDED:
            inputs = [artifact for stage in view.plan["stages"] for artifact in stage["inputs"].values()]
            wanted += [(a["name"], a["version"]) for a in inputs if a["source"] == "store"]
            folders |= {os.path.realpath(a["uri"]) for a in inputs if a["source"] == "path"}
    kept: set[tuple[str, int]] = set()
    while wanted:
        key = wanted.pop()
        if key in kept or key not in manifests:
            continue
        kept.add(key)
        for parent in manifests[key]["parents"]:
            if parent["source"] == "store":
                wanted.append((parent["name"], parent["version"]))
            elif parent["source"] == "path":
                folders.add(os.path.realpath(parent["uri"]))
    return kept, folders


def _checkpoints(view: RunView, folders: set[str], policy: Policy, now: float) -> Iterator[Item]:
    """Checkpoints of stages that have succeeded, but for the newest; a stage that may go on keeps them all."""
    for stage in view.stages:
        root = RunDir(Path(view.path)).stage(stage.name).checkpoints
        if stage.state != "succeeded" or not stage.ended or now - stage.ended < policy.older_than:
            continue
        newest = latest_checkpoint(root)
        for folder in sorted(root.glob("iter_*")):
            real = os.path.realpath(folder)
            used = any(place == real or place.startswith(f"{real}/") for place in folders)
            # A link names a folder that its backend keeps under a name of its own: that one is the backend's to remove.
            if folder != newest and not used and folder.is_dir() and not folder.is_symlink():
                size = sum(path.stat().st_size for path in files_below(folder))
                what = f"{view.id}/{stage.name}/{folder.name}"
                yield Item(what, str(folder), size, "the stage has succeeded, and this is not its last checkpoint")
