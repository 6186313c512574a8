"""Folders in which an output grows before it becomes a version, and their cleaning after crashes.

<store>/.staging/<id>/owner.json           the process that fills it
<store>/.staging/<id>/version/content/     the output; `version` is what the commit renames into place
"""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path

from nemotron_recipes.artifacts.owner import fate, this_process
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.rundir import Damaged, read_json, write_sealed

OLD = 14 * 24 * 3600  # seconds without a change after which staging of an unprovable owner counts as left behind


@dataclass(frozen=True)
class Staged:
    """An output in the making; write below `content`, then hand this to `Store.commit`."""

    name: str
    folder: Path

    @property
    def version(self) -> Path:
        return self.folder / "version"

    @property
    def content(self) -> Path:
        return self.version / "content"


def create(root: Path, name: str) -> Staged:
    """A fresh private folder below `<root>/.staging`, owned by this process."""
    staged = Staged(name, root / ".staging" / f"{name}-{uuid.uuid4().hex}")
    staged.folder.mkdir(parents=True)
    write_sealed(staged.folder / "owner.json", this_process())
    staged.content.mkdir(parents=True)
    return staged


def clean(root: Path, now: float) -> list[Path]:
    """Remove what crashed processes left; returns what was removed.

    `now`: the file system's own clock (the mtime of a file just made there), since hosts' clocks differ.
    """
    removed = []
    for folder in sorted((root / ".staging").glob("*")):
        if folder.name.startswith(".gone-"):
            shutil.rmtree(folder, ignore_errors=True)  # another cleaner may be at it too
        elif _left_behind(folder, now):
            grave = folder.with_name(f".gone-{uuid.uuid4().hex}")
            try:
                os.rename(folder, grave)  # of several cleaners one wins
            except FileNotFoundError:
                continue
            shutil.rmtree(grave, ignore_errors=True)
            removed.append(folder)
    return removed


def own_files(content: Path) -> list[Path]:
    """Make the output's files its own, and read-only; returns them in a stable order.

    A file that shares its inode with another name is copied: a version shares no data with anything that may change.
    Links and special files are refused, since their content lies elsewhere.
    """
    files: list[Path] = []
    for folder, folders, names in os.walk(content, onerror=_raise):
        for name in folders + names:
            path = Path(folder, name)
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
                raise UserError(
                    Problem(f"the output holds {what}: {path.relative_to(content)}", str(content), "copy the file")
                )
            if status.st_nlink > 1:
                copy = path.with_name(f".{uuid.uuid4().hex}.tmp")
                shutil.copyfile(path, copy)
                shutil.copymode(path, copy)
                os.replace(copy, path)
            path.chmod(stat.S_IMODE(status.st_mode) & ~0o222)
            files.append(path)
    return sorted(files, key=lambda path: path.relative_to(content).as_posix())


def _left_behind(folder: Path, now: float) -> bool:
    try:
        owner = read_json(folder / "owner.json") or {}
    except Damaged:  # whose it is, nobody knows
        owner = {}
    if fate(owner) == "gone":
        return True
    return now - _newest_change(folder) > OLD


def _newest_change(folder: Path) -> float:
    """mtime of the youngest file or folder below `folder`; what vanishes meanwhile doesn't count."""
    newest = 0.0
    for place, _, names in os.walk(folder):
        for path in [place, *(os.path.join(place, name) for name in names)]:
            try:
                newest = max(newest, os.lstat(path).st_mtime)
            except FileNotFoundError:
                continue
    return newest


def _raise(error: OSError) -> None:
    raise error
