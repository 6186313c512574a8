"""Whether a failure comes from a full disk or a used-up quota. Standard library only."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_PROBE_BYTES = 1 << 20


def full_folder(error: BaseException, folders: Iterable[Path]) -> Path | None:
    """The one of `folders` whose lack of room made `error`; None when room is not the reason.

    Libraries in C++ and Rust say so in words of their own, or only that a file has the wrong length (torch.save), so
    besides looking for the error number a folder is tried: what has just failed there has left no room for a MiB.
    """
    folders = [folder for folder in folders if folder.is_dir()]
    full = next((folder for folder in folders if not _has_room(folder)), None)
    if full is None and any(_says_no_room(link) for link in _chain(error)):
        return min(folders, key=lambda folder: shutil.disk_usage(folder).free, default=None)
    return full


def in_words(folder: Path, kept: Path | None) -> str:
    """What happened and what to do. kept: the newest whole checkpoint."""
    usage = shutil.disk_usage(folder)
    free = f"{usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free"
    said = f"no room is left below {folder} ({free}, or a quota is used up)"
    if kept is None:
        return f"{said}; what was being written is removed. Make room, then start it again"
    return (
        f"{said}; what was being written is removed, {kept} is whole. Make room, then start it again with "
        "train.resume=true to go on from there"
    )


def _has_room(folder: Path) -> bool:
    probe = folder / f".room-{uuid.uuid4().hex}"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            left = _PROBE_BYTES
            while left:
                left -= os.write(descriptor, b"x" * left)
            os.fsync(descriptor)  # where writes are delayed, a quota is noticed only here
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.errno not in _NO_ROOM
    finally:
        with suppress(OSError):  # not there; or a read-only file system, which says so of a missing file too
            probe.unlink()
    return True


def _says_no_room(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    return any(os.strerror(number) in str(error) for number in _NO_ROOM)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
