"""The copy on this machine of a run's folder on another one (or of a store's manifests): what readers read.

The folder there is the truth. Code, worker files and checkpoints stay there; of checkpoints the folders' names are
here. A log that has grown is fetched from where the copy ends; any other file that has changed comes anew, for its
inode tells nothing: a file system gives it to the next file at once. What is known of the folder there lies beside the
copy: the next command goes on.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from nemotron_recipes.errors import NemotronError
from nemotron_recipes.executors.remote import there, there_changes
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import COPIED, read_json, write_sealed

_NOTHING = [0, 0, 0, ""]
Call = Callable[..., Any]


class Untrusted(NemotronError):
    """The other machine names a file that does not belong into the folder."""


def refresh(
    call: Call,
    far: str,
    near: Path,
    mark: str = COPIED,
    wanted: Callable[[str], bool] = lambda name: True,
    changes: Call = there_changes.of_run,
) -> None:
    """Bring here what has changed there. Unreachable, or OSError; what has come until then stays.

    mark     name of the file that says what is known of the folder there
    wanted   whether a file or folder of that name belongs here
    changes  what is asked there
    """
    near.mkdir(parents=True, exist_ok=True)
    with open(near / ".copying.lock", "ab") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        known: dict[str, Any] = (read_json(near / mark) or {}).get("files", {})
        known = {
            name: was if not wanted(name) or _is_here(near, name, was) else _NOTHING for name, was in known.items()
        }
        begun: set[str] = set()
        more = True
        while more:
            said = call(changes, far, known)
            for name, now, offset, data in said["files"]:
                if wanted(name):
                    _put(near, name, offset, data, now[2])
                known[name] = now
            for name in filter(wanted, said["folders"]):
                _inside(near, name).mkdir(parents=True, exist_ok=True)
            for name in said["gone"]:
                if wanted(name):
                    _inside(near, name).unlink(missing_ok=True)
                del known[name]
            new = {name for name, _, offset, _ in said["files"] if offset == 0}
            more = said["more"] and not new & begun  # one that changes faster than it comes waits for the next time
            begun |= new
            # name -> inode, size, time, digest of the end: there.changes
            write_sealed(near / mark, {"files": known, "time": time.time()}, kind="copied")


def age(near: Path) -> float | None:
    """Seconds since the copy was last complete; None: it never was."""
    told = read_json(near / COPIED)
    return time.time() - told["time"] if told else None


def _is_here(near: Path, name: str, was: Sequence[Any]) -> bool:
    """Whether this machine still has what it got of a file, as `changes` speaks of it today."""
    with suppress(FileNotFoundError):
        return len(was) == len(_NOTHING) and _inside(near, name).stat().st_size >= was[1]
    return False


def _put(near: Path, name: str, offset: int, data: bytes, stamp: int) -> None:
    path = _inside(near, name)
    if offset == 0 and len(data) < there.PIECE:
        write_atomic(path, data)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if offset else "wb") as handle:
            handle.truncate(offset)
            handle.seek(offset)
            handle.write(data)
    os.utime(path, ns=(stamp, stamp))


def _inside(near: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or parts[0].startswith("."):
        raise Untrusted(f"the folder there is said to hold {name!r}")
    return near.joinpath(*parts)
