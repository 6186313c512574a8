"""A shard: a piece of a source that is prepared by itself, and what tells its content (cuts.py makes them)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from nemotron_recipes.data.files import Input, open_input
from nemotron_recipes.fsio import file_digest

_PIECE = 1 << 18  # stays in the cache of a CPU


@dataclass(frozen=True)
class Shard:
    """A piece of one source. `kind` says how it is read (readers.py) and what `lo` and `hi` count: bytes of JSON Lines
    (the lines that start in [lo, hi)), row groups of parquet, shards of a hub stream; nothing of other kinds."""

    source: int  # index of the source
    file: int  # index of the file in its source
    kind: str
    name: str  # of the file, relative to the source
    place: str  # path or address, for reading and for people
    lo: int = 0
    hi: int = 0
    limit: int | None = None  # read at most this many rows
    seed: int = 0
    task: tuple[str, str] = ("", "")  # sample: split and method; hub: subset and split
    revision: str | None = None
    size: int = 0  # bytes, for the progress

    @property
    def first(self) -> bool:
        return self.lo == 0

    @property
    def file_of_hub(self) -> str | None:
        """Which file of its split it is a piece of; None: of all, in rows that are streamed."""
        return None if self.kind == "hub" else self.name.rpartition("/")[2]


def content_digest(shard: Shard) -> str:
    """What identifies the rows of a shard, wherever they lie. OSError: they can't be read."""
    if shard.kind == "lines" and "://" not in shard.place:
        digest = hashlib.sha256(b"first" if shard.first else b"later")
        with open(shard.place, "rb") as handle:
            for piece in _pieces(handle, shard.lo, shard.hi):
                digest.update(piece)
        return digest.hexdigest()
    facts = [shard.kind, shard.lo, shard.hi, shard.limit, shard.seed, shard.task, shard.revision]
    if shard.kind in ("sample", "hub"):
        facts.append(shard.place)
    elif "://" in shard.place:
        facts += [shard.place, open_input(shard.place).identity]
    else:
        state = os.stat(shard.place)
        facts.append(_whole_file(shard.place, state.st_size, state.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def file_state(shard: Shard) -> object:
    """Cheap facts that change when somebody writes to the file of a shard, or takes it away."""
    if shard.kind in ("sample", "hub"):
        return None
    try:
        return Input(shard.name, shard.place, shard.size).state
    except OSError as error:
        return str(error)


@lru_cache(maxsize=64)
def _whole_file(place: str, size: int, changed: int) -> str:
    """The digest of a file that is cut where its bytes don't show: once for all its shards, as long as it stays."""
    return file_digest(Path(place))


def _pieces(handle: IO[bytes], lo: int, hi: int) -> Iterator[bytes]:
    """The bytes of the lines that start in [lo, hi), with what precedes them: from lo - 1 to the last line's end."""
    handle.seek(max(lo - 1, 0))
    left = hi - max(lo - 1, 0)
    piece = b""
    begun = lo == 0  # a line starts in the range
    while left > 0 and (piece := handle.read(min(_PIECE, left))):
        left -= len(piece)
        begun = begun or b"\n" in (piece if left else piece[:-1])
        yield piece
    if not begun or piece.endswith(b"\n"):
        return
    while piece := handle.readline(_PIECE):
        yield piece
        if piece.endswith(b"\n"):
            return
