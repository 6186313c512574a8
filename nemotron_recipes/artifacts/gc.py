"""What the store and the run folders can do without, and a quarantine on the way out.

Kept, always: the newest versions of a name, versions with an alias, what a run that goes on reads, and everything that
any kept version descends from. `find` only reads; `quarantine` renames, so that a wrong choice can be taken back with
`restore` until `purge` deletes. Each step may be cut off at any moment: what was begun is on disk, and the next `purge`
goes on with it.

    <root>/.quarantine/<id>/item.json     where it came from, when, why; where its content lies; that deleting has begun
    <root>/.quarantine/<id>/content       the version, or the checkpoint
    <checkpoints>/.quarantine-<id>        ... of a checkpoint that lies on another file system
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import files_below, fsync_folder
from nemotron_recipes.rundir import RunDir, latest_checkpoint, read_json, write_sealed
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
class Left:
    """Something that stays although it could go, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Kept:
    """Versions that stay, in the store or not, and folders that they were made from or that coming runs will read."""

    versions: frozenset[tuple[str, int]]
    folders: frozenset[str]

    def holds(self, item: Tree) -> bool:
        """Whether something in quarantine is needed once more: by a version registered since, or a run."""
        name, _, version = str(item["what"]).rpartition(":v")
        return (name, int(version) if version.isdigit() else 0) in self.versions or _reads(self.folders, item["path"])


@dataclass(frozen=True)
class Policy:
    """keep: newest versions of each name; older_than: seconds since it was made, younger things stay."""

    keep: int = 3
    older_than: float = 30 * 24 * 3600.0


def find(store: Store, runs: Iterable[RunView], policy: Policy, now: float) -> tuple[list[Item], Kept]:
    """(everything that can go, largest first; what stays). UserError: a damaged manifest or plan, whose ancestors or
    inputs nobody knows."""
    views = list(runs)
    _refuse_unread(views)
    manifests = {
        (name, version): store.describe(store.resolve(f"{name}:v{version}"))
        for name in store.names()
        for version in store.versions(name)
    }
    kept = _kept(store, manifests, views, policy, now)
    items = [
        Item(
            f"{name}:v{version}",
            str(store.root / name / f"v{version}"),
            manifest["size"],
            "nothing that is kept descends from it",
        )
        for (name, version), manifest in manifests.items()
        if (name, version) not in kept.versions
    ]
    items += [item for view in views for item in _checkpoints(view, kept.folders, policy, now)]
    return sorted(items, key=lambda item: (-item.size, item.what)), kept


def quarantine(root: Path, items: Iterable[Item], now: float) -> tuple[list[Item], list[Left]]:
    """Move items out of sight: (what moved, what could not be moved). What has gone meanwhile is in neither."""
    moved, left = [], []
    for item in items:
        place = root / ".quarantine" / uuid.uuid4().hex
        try:
            if _move(item, place, now):
                moved.append(item)
        except OSError as error:  # its place stays: what is in it may be all there is
            left.append(Left(item.what, f"{item.path} can't be moved safely: {error.strerror}"))
    return moved, left


def quarantined(root: Path) -> list[tuple[Path, Tree]]:
    """(folder, its item.json) of everything in quarantine that can be restored. Damaged: an item.json."""
    held = [(place, item) for place, item in _places(root) if not item.get("deleting")]
    return [(place, item) for place, item in held if _content(place, item).exists()]


def restore(root: Path, what: str) -> Item:
    """Bring something back to where it was. UserError: it isn't in quarantine, or its place is taken."""
    for place, item in quarantined(root):
        if item["what"] == what:
            home = Path(item["path"])
            if home.exists():
                raise UserError(Problem(f"there is something at {home} again", str(place)))
            home.parent.mkdir(parents=True, exist_ok=True)
            os.rename(_content(place, item), home)
            fsync_folder(home.parent)
            shutil.rmtree(place)
            return Item(**{field: item[field] for field in Item.__dataclass_fields__})
    held = ", ".join(item["what"] for _, item in quarantined(root)) or "nothing"
    raise UserError(Problem(f"'{what}' is not in quarantine", str(root / ".quarantine"), f"it holds: {held}"))


def purge(root: Path, before: float, kept: Kept) -> tuple[list[str], list[Left]]:
    """Delete what was quarantined before that time, and what an earlier purge had begun to: (what it was, what stays
    because it is needed again or could not be deleted)."""
    gone, left = [], []
    for empty in (root / ".quarantine").glob("*"):
        with suppress(OSError):  # it holds something
            empty.rmdir()
    for place, item in _places(root):
        content, what = _content(place, item), str(item["what"])
        begun = bool(item.get("deleting"))
        try:
            if not begun and (item["quarantined"] >= before or not content.exists()):
                _forget_unused(place, item, before)
                continue
            if not content.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, "its folder is away", str(content))
        except OSError as error:
            left.append(Left(what, f"{content} can't be reached: {error.strerror}"))
            continue
        if not begun and kept.holds(item):
            left.append(Left(what, f"it is needed again: nemotron gc --restore {what}"))
            continue
        try:
            if not begun:
                write_sealed(place / "item.json", {**item, "deleting": True})  # from here on it is no use to anybody
            if content.exists():
                shutil.rmtree(content)
            shutil.rmtree(place)
        except OSError as error:
            left.append(Left(what, f"{error.filename or content} can't be deleted: {error.strerror}"))
            continue
        gone.append(what)
    return gone, left


def _move(item: Item, place: Path, now: float) -> bool:
    """Into quarantine; False when it is gone. What is about to happen is on disk before it does."""
    place.mkdir(parents=True)
    told = {**asdict(item), "quarantined": now}
    write_sealed(place / "item.json", told)
    target = place / "content"
    try:
        try:
            os.rename(item.path, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            target = Path(item.path).with_name(f".quarantine-{place.name}")
            write_sealed(place / "item.json", {**told, "content": str(target)})
            os.rename(item.path, target)
    except FileNotFoundError:
        shutil.rmtree(place, ignore_errors=True)
        return False
    for folder in {Path(item.path).parent, target.parent}:
        fsync_folder(folder)
    return True


def _places(root: Path) -> list[tuple[Path, Tree]]:
    folder = root / ".quarantine"
    found = [(path, read_json(path / "item.json")) for path in (sorted(folder.iterdir()) if folder.is_dir() else ())]
    return [(path, item) for path, item in found if item is not None]


def _content(place: Path, item: Tree) -> Path:
    return Path(item.get("content") or place / "content")


def _forget_unused(place: Path, item: Tree, before: float) -> None:
    """A place that was made ready for something that then did not come. Where the folder is away in which it should be,
    its file system isn't mounted: nobody knows."""
    content = _content(place, item)
    if item["quarantined"] < before and content.parent.is_dir() and not content.exists():
        shutil.rmtree(place, ignore_errors=True)


def _refuse_unread(views: list[RunView]) -> None:
    unread = [
        Problem(f"what run {view.id} reads is unknown: {view.explanation}", view.path, "mend it, or remove its folder")
        for view in views
        if not view.plan
    ]
    if unread:
        raise UserError(*unread)


def _kept(
    store: Store, manifests: dict[tuple[str, int], Tree], views: list[RunView], policy: Policy, now: float
) -> Kept:
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
    known = {**_in_quarantine(store.root), **manifests}
    kept: set[tuple[str, int]] = set()
    while wanted:
        key = wanted.pop()
        if key in kept:
            continue
        kept.add(key)
        for parent in known[key]["parents"] if key in known else ():
            if parent["source"] == "store":
                wanted.append((parent["name"], parent["version"]))
            elif parent["source"] == "path":
                folders.add(os.path.realpath(parent["uri"]))
    return Kept(frozenset(kept), frozenset(folders))


def _in_quarantine(root: Path) -> dict[tuple[str, int], Tree]:
    """Manifests of versions there: what is needed again needs its own ancestors."""
    found = [read_json(_content(place, item) / "artifact.json") for place, item in quarantined(root)]
    return {(manifest["name"], manifest["version"]): manifest for manifest in found if manifest is not None}


def _reads(folders: Iterable[str], path: str) -> bool:
    """Whether one of these folders lies there or below."""
    real = os.path.realpath(path)
    return any(place == real or place.startswith(f"{real}/") for place in folders)


def _checkpoints(view: RunView, folders: Iterable[str], policy: Policy, now: float) -> Iterator[Item]:
    """Checkpoints of stages that have succeeded, but for the newest; a stage that may go on keeps them all."""
    for stage in view.stages:
        root = RunDir(Path(view.path)).stage(stage.name).checkpoints
        if stage.state != "succeeded" or not stage.ended or now - stage.ended < policy.older_than:
            continue
        newest = latest_checkpoint(root)
        for folder in sorted(root.glob("iter_*")):
            # A link names a folder that its backend keeps under a name of its own: that one is the backend's to remove.
            if folder != newest and not _reads(folders, str(folder)) and folder.is_dir() and not folder.is_symlink():
                size = sum(path.stat().st_size for path in files_below(folder))
                what = f"{view.id}/{stage.name}/{folder.name}"
                yield Item(what, str(folder), size, "the stage has succeeded, and this is not its last checkpoint")
