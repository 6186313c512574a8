"""A source cut into shards: the pieces that are prepared in parallel. Where the cuts are never shows in the output."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO

from nemotron_recipes.data.files import Input, kind_of, open_input
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import file_digest

SHARD_BYTES = 4 << 20  # of text: a few seconds of work
MOST_SHARDS = 4096  # beyond it shards grow instead
_PIECE = 1 << 20


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


def cut_file(shard: Shard, file: Input, rows: int | None, target: int) -> tuple[list[Shard], int]:
    """The shards of one file, and how many rows they hold where `rows` limits them (else 0)."""
    if shard.kind == "lines":
        end, found = (file.size, 0) if rows is None else _end_of_rows(file, rows)
        return [
            replace(shard, lo=lo, hi=min(lo + target, end), size=min(target, end - lo)) for lo in range(0, end, target)
        ], found
    if shard.kind == "parquet":
        return _row_groups(shard, file, rows, target)
    return [replace(shard, limit=rows, size=file.size)], 0 if rows is None else _count(shard, rows)


def target_size(total: int) -> int:
    """Bytes per shard for inputs of `total` bytes: a power of two times SHARD_BYTES, so that growing data keep most
    of their cuts, and with them what was prepared before."""
    target = SHARD_BYTES
    while total > target * MOST_SHARDS:
        target *= 2
    return target


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
        return open_input(shard.place).state
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


def _end_of_rows(file: Input, rows: int) -> tuple[int, int]:
    """(bytes, rows): where the first `rows` rows end."""
    found = position = 0
    with file.open() as handle:
        while found < rows and (line := handle.readline(_PIECE)):
            position += len(line)
            content = line.strip() != b""
            while not line.endswith(b"\n") and (line := handle.readline(_PIECE)):
                position += len(line)
                content = content or line.strip() != b""
            found += content
    return position, found


def _row_groups(shard: Shard, file: Input, rows: int | None, target: int) -> tuple[list[Shard], int]:
    from nemotron_recipes.data.readers import parquet_file

    shards: list[Shard] = []
    metadata = parquet_file(file.place).metadata
    lo = size = held = total = 0
    for group in range(metadata.num_row_groups):
        facts = metadata.row_group(group)
        left = None if rows is None else rows - total - held
        if left is not None and left <= 0:
            break
        size += facts.total_byte_size
        held += facts.num_rows
        if size >= target or group == metadata.num_row_groups - 1 or (left is not None and facts.num_rows >= left):
            limit = None if rows is None else min(held, rows - total)
            shards.append(replace(shard, lo=lo, hi=group + 1, limit=limit, size=size))
            total += held
            lo, size, held = group + 1, 0, 0
    return shards, min(total, rows) if rows is not None else 0


def _count(shard: Shard, rows: int) -> int:
    from nemotron_recipes.data.readers import count_rows

    return count_rows(shard, rows)


def cut_inputs(source: int, files: Sequence[Input], rows: int | None, target: int) -> list[Shard]:
    """The shards of a source's files in order; at most the first `rows` rows of the source."""
    shards: list[Shard] = []
    left = rows
    for index, file in enumerate(files):
        if left is not None and left <= 0:
            break
        shard = Shard(source, index, kind_of(file.place), file.name, file.place)
        try:
            cut, found = cut_file(shard, file, left, target)
        except OSError as error:
            raise UserError(Problem(f"{file.place} can't be read: {error}")) from None
        shards += cut
        left = None if left is None else left - found
    return shards
