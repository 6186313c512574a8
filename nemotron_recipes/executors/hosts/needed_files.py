"""Files that a run needs, looked at where they lie: on another host by agent.py. Standard library only."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from nemotron_recipes.fsio import file_digest


def above_glob(pattern: str) -> str:
    """The path itself where it exists, else the deepest folder above its first wildcard."""
    path = Path(pattern)
    while not os.path.exists(path) and glob.has_magic(str(path)):
        path = path.parent
    return str(path)


def matches(pattern: str) -> list[Path]:
    """The path itself where it exists, else what the glob finds."""
    return [Path(name) for name in ([pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True))]


def stale(root: str, files: Mapping[str, Sequence[object]]) -> list[str]:
    """Those that are not below `root` as they should be: name -> [size, time in whole seconds, digest or ""].

    Where a digest is given the content is read, and the time doesn't count.
    """
    found = []
    for name, (size, seconds, digest) in files.items():
        path = Path(root + name)
        try:
            status = path.stat()
            same = status.st_size == size and (
                file_digest(path) == digest if digest else int(status.st_mtime) == seconds
            )
        except OSError:
            same = False
        if not same:
            found.append(name)
    return found


def digests(root: str, names: Sequence[str]) -> dict[str, str]:
    """name -> digest; "" of one that can't be read."""
    found = dict.fromkeys(names, "")
    for name in names:
        with suppress(OSError):
            found[name] = file_digest(Path(root + name))
    return found


def missing(names: Sequence[str]) -> list[str]:
    """Those that are not there."""
    return [name for name in names if not os.path.exists(name)]
