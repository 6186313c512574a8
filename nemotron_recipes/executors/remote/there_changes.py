"""What has changed in a folder of the machine that has the cluster, for the copy of it elsewhere: replica.py.

Called through `transport.call`: on a machine that is reached over SSH these very functions run. Standard library only.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from nemotron_recipes.executors.remote import there

# Below a run: what no reader on another machine looks into. Of what is below `checkpoints` the names are enough.
NOT_COPIED = ("code", "files", "mirror", "partial")
APPENDED = (".jsonl", ".log", ".out", ".err")  # files that only grow; others are replaced, maybe under the same inode
TAIL = 4096  # bytes at the end of what is known of such a file: they tell whether it is still how it begins
OWN = ("handle.json",)  # each side has its own

Known = Mapping[str, Sequence[Any]]
Look = Callable[[dict[str, os.stat_result], list[str]], None]


def of_run(root: str, known: Known) -> dict[str, Any]:
    """What has changed below a run's folder since somebody knew its files as `known`."""
    return _changes(root, known, lambda found, folders: _look(root, "", found, folders))


def of_store(root: str, known: Known) -> dict[str, Any]:
    """The same of an artifact store's manifests and aliases: what there is to know without the data."""
    return _changes(root, known, lambda found, _: found.update(_manifests(root)))


def _changes(root: str, known: Known, look: Look) -> dict[str, Any]:
    """Of the files that `look` finds.

    known    name -> [inode, size, time in ns, digest of the end]: how far a file is known, and when it was changed last
    files    [name, what is known of it then, offset, content]: to be put at `offset`, where the known part ends
    folders  names of folders whose content is not looked at, but which are there
    gone     names that are no more
    more     whether it was too much for one answer
    """
    os.stat(root)  # a folder that is gone, or not mounted now, must not empty the copy
    found: dict[str, os.stat_result] = {}
    folders: list[str] = []
    look(found, folders)
    files: list[Any] = []
    room = there.PIECE
    more = False
    for name in sorted(found, key=lambda name: found[name].st_size):  # a huge log comes last
        seen, was = found[name], known.get(name)
        if was is not None and [seen.st_ino, seen.st_size, seen.st_mtime_ns] == [*was[:3]]:
            continue
        if room <= 0:
            more = True
            break
        try:
            with open(os.path.join(root, name), "rb") as handle:
                now = os.fstat(handle.fileno())  # it may have been replaced since the folder was read
                offset = was[1] if was is not None and _goes_on(name, handle, now, was) else 0
                handle.seek(offset)
                data = handle.read(min(room, now.st_size - offset))
                end = offset + len(data)
                files.append([name, [now.st_ino, end, now.st_mtime_ns, _end_of(handle, end)], offset, data])
        except FileNotFoundError:
            continue
        room -= len(data)
        more = more or end < now.st_size
    return {"files": files, "folders": folders, "gone": [name for name in known if name not in found], "more": more}


def _goes_on(name: str, handle: BinaryIO, now: os.stat_result, was: Sequence[Any]) -> bool:
    """Whether what is known of a file is how it still begins: it has grown, or was too large for one answer."""
    inode, size, time_ns, end = was
    if now.st_ino != inode or not 0 < size < now.st_size:
        return False
    return (name.endswith(APPENDED) or now.st_mtime_ns == time_ns) and _end_of(handle, size) == end


def _end_of(handle: BinaryIO, size: int) -> str:
    """Digest of the last bytes of a file's first `size` ones."""
    handle.seek(max(0, size - TAIL))
    return hashlib.sha256(handle.read(min(size, TAIL))).hexdigest()


def _look(root: str, below: str, found: dict[str, os.stat_result], folders: list[str]) -> None:
    """Backends name a checkpoint's folder each in its own way, and link `iter_*` to it: no name tells it apart."""
    checkpoints = below.endswith("/checkpoints")
    with suppress(FileNotFoundError), os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
            name = os.path.join(below, entry.name)
            if checkpoints and entry.name.startswith("iter_") and entry.is_dir():
                folders.append(name)
            elif entry.is_symlink() or entry.name.endswith(".tmp") or entry.name == "secrets.json":
                continue
            elif entry.is_dir():
                if checkpoints or entry.name in NOT_COPIED:
                    folders.append(name)
                else:
                    _look(root, name, found, folders)
            elif name not in OWN:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found[name] = status


def _manifests(root: str) -> Iterator[tuple[str, os.stat_result]]:
    for name in (*glob.glob("*/v*/artifact.json", root_dir=root), *glob.glob("*/.aliases/*", root_dir=root)):
        with suppress(FileNotFoundError):
            yield name, os.stat(os.path.join(root, name))
