"""Digests of whole checkpoints, whichever backend wrote them: what was saved is what training goes on from.

    <checkpoints>/.digests/of_iter_NNNNNNN.json    sealed; files: relative name -> [bytes, digest]
    <checkpoints>/iter_NNNNNNN/digests.json        the same, in a checkpoint that this project itself has written

Beside a folder that belongs to a trainer of another project: such trainers remove their old folders at any moment, and
a file that appears there meanwhile would make that fail, and with it the training. No name begins with `iter_`:
Megatron-Bridge takes whatever does, at any depth, for a checkpoint to remove (training/checkpointing.py, 0.3 to 0.6).
A digest "" says that only the length is known: whoever read the checkpoint has been stopped before it came so far.
Standard library only.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_recipes.fsio import HASHERS, files_below
from nemotron_recipes.rundir import COPIED, Damaged, check_mark, mark, read_json, write_sealed

DIGESTS = "digests.json"
BESIDE = ".digests"
_OF = "of_"
_NAME = re.compile(r"iter_(\d{7,})")
_PASSING = ".nfs"  # names that a file system gives to what is removed while somebody has it open


@dataclass(frozen=True)
class Checked:
    """What was held against the digests: bytes read, and how many files only by their length."""

    size: int
    unread: int


def seal_inside(folder: Path) -> None:
    """Before a checkpoint of our own gets its name: its digests, in itself."""
    _write(folder / DIGESTS, _marks(folder, sorted(_names(folder))))


def seal_beside(folder: Path, stop: Callable[[], bool] = lambda: False) -> bool:
    """The digests of a whole checkpoint of a trainer: lengths at once, then all of it is read. True when it was, and
    nothing has changed meanwhile.

    stop  asked again and again: once it is true, the reading ends, and lengths are all that is known

    OSError: it can't be read, or has gone.
    """
    beside, before = beside_of(folder), _stamps(folder)
    if not before:
        raise FileNotFoundError(errno.ENOENT, "no files", str(folder))
    _write(beside, {name: [stamp[0], ""] for name, stamp in before.items()})
    try:
        marks = _marks(folder, sorted(before), stop)
    except _Stopped:
        return False
    if _stamps(folder) != before:
        return False
    _write(beside, marks)
    return True


def forget(root: Path, after: int) -> None:
    """Remove the digests of later steps, which are saved anew, and of folders that are gone."""
    for path in (root / BESIDE).glob(f"{_OF}*.json"):
        folder = root / path.stem.removeprefix(_OF)
        step = _NAME.fullmatch(folder.name)
        if step and (int(step[1]) > after or not folder.is_dir()):
            path.unlink(missing_ok=True)


def check(folder: Path, part: int = 0, parts: int = 1) -> Checked | None:
    """Before anything of a checkpoint is loaded, which may execute what stands in it: all that is known of it holds.

    None: nothing is known, since an earlier version or somebody else has written it. Damaged names the file that is
    not as it was saved, is gone, or has come since. With `parts` > 1 each of so many callers reads a part of the files.
    Where only lengths are known the trainer may still have been adding to it: then nothing may lack.
    """
    known = _read(folder)
    if known is None:
        return None
    unread = sum(not digest for _, digest in known.values())
    for name in sorted(_names(folder) - known.keys()) if not unread else ():
        fix = f"{_other(folder)}; or move the file away, if it doesn't belong there"
        raise Damaged(folder / name, "the checkpoint had no such file when it was saved", fix=fix)
    mine = sorted(known)[part::parts]

    def look(name: str) -> None:
        try:
            check_mark(folder / name, known[name], exactly=not unread)
        except Damaged as error:
            raise Damaged(folder / name, error.reason, fix=_other(folder)) from None

    with ThreadPoolExecutor(HASHERS) as pool:
        list(pool.map(look, mine))
    return Checked(sum(known[name][0] for name in mine), unread)


def changed(root: Path) -> Iterator[Damaged]:
    """What is wrong with the checkpoints below a folder, one error for each that is not as it was saved."""
    for folder in _folders(root):
        try:
            check(folder)
        except Damaged as error:
            yield error


def unread(root: Path) -> list[Path]:
    """The checkpoints below a folder of which not everything has a digest."""
    found = [(folder, _read(folder)) for folder in _folders(root)]
    return [folder for folder, known in found if known is None or not all(digest for _, digest in known.values())]


def is_read(folder: Path) -> bool:
    """Whether every file of a checkpoint has a digest."""
    known = _read(folder)
    return known is not None and all(digest for _, digest in known.values())


def beside_of(folder: Path) -> Path:
    """Where the digests of a trainer's own folder lie."""
    return folder.parent / BESIDE / f"{_OF}{folder.name}.json"


class _Stopped(Exception):
    """Nobody wants to wait for the rest."""


def _folders(root: Path) -> list[Path]:
    """Those that are on this machine: the copy of a run's folder on another one has only their names."""
    if (root.parent.parent / COPIED).exists():
        return []
    return sorted(folder for folder in root.glob("iter_*") if _NAME.fullmatch(folder.name) and folder.is_dir())


def _read(folder: Path) -> dict[str, Any] | None:
    for path in (folder / DIGESTS, beside_of(folder)):
        if (tree := read_json(path)) is not None:
            files: dict[str, Any] = tree["files"]
            return files
    return None


def _write(path: Path, marks: dict[str, Any]) -> None:
    write_sealed(path, {"files": marks}, kind="checkpoint")


def _marks(folder: Path, names: list[str], stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    def go_on() -> None:
        if stop():
            raise _Stopped

    with ThreadPoolExecutor(HASHERS) as pool:
        return dict(zip(names, pool.map(lambda name: mark(folder / name, each=go_on), names), strict=True))


def _names(folder: Path) -> set[str]:
    """Of all its files, but for its digests."""
    found = (path.relative_to(folder).as_posix() for path in files_below(folder))
    return {name for name in found if name != DIGESTS and not name.rpartition("/")[2].startswith(_PASSING)}


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> (bytes, time) of all its files."""
    status = {name: os.stat(folder / name) for name in _names(folder)}
    return {name: (found.st_size, found.st_mtime_ns) for name, found in status.items()}


def _other(folder: Path) -> str:
    """What to do instead of going on from this one."""
    others = [other for other in _folders(folder.parent) if other.name != folder.name]
    if others:
        return f"go on from another checkpoint: checkpoint.load={others[-1]}"
    return "bring it back from a copy, or start anew without it"
