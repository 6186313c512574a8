"""The sequences of a split as a file of small records, so that memory doesn't grow with their number."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemotron_recipes.data.packing import WINDOW, packing

# A sequence is a range of its shard's spool: `start` and `length` in tokens, `shard` counted in input order.
RECORD = np.dtype([("shard", "<i4"), ("length", "<i4"), ("start", "<i8")])


class SequenceFile:
    """Records one after another; grows at its end, is read anywhere."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = path.open("w+b")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, records: np.ndarray) -> None:
        self._handle.write(np.ascontiguousarray(records, dtype=RECORD).data)
        self._count += len(records)

    def read(self, first: int, last: int) -> np.ndarray:
        """Records [first, last), or as many of them as there are."""
        self._handle.flush()
        size = RECORD.itemsize
        return np.frombuffer(os.pread(self._handle.fileno(), (last - first) * size, first * size), dtype=RECORD)

    def close(self) -> None:
        self._handle.close()


@dataclass(frozen=True)
class PackList:
    """Which sequences share a pack: those of pack i are `sequences.read(offsets[i], offsets[i + 1])`."""

    sequences: SequenceFile  # pack after pack
    offsets: np.ndarray  # int64 [packs + 1]
    tokens: np.ndarray  # int64 [packs]


def pack_sequences(sequences: SequenceFile, capacity: int, place: Path) -> PackList:
    """Best-fit decreasing in windows, see `packing`. The sequences go to `place` in the order of their packs."""
    ordered = SequenceFile(place)
    offsets, tokens = array("q", [0]), array("q")
    for start in range(0, len(sequences), WINDOW):
        records = sequences.read(start, start + WINDOW)
        packed = packing(records["length"], capacity)
        ordered.add(records[packed.sequences])
        offsets.extend((packed.offsets[1:] + start).tolist())
        tokens.extend(packed.tokens.tolist())
    return PackList(ordered, np.array(offsets, dtype=np.int64), np.array(tokens, dtype=np.int64))


def alone(sequences: SequenceFile) -> PackList:
    """Each sequence a pack of its own, in order."""
    tokens = array("q")
    for start in range(0, len(sequences), WINDOW):
        tokens.extend(sequences.read(start, start + WINDOW)["length"].tolist())
    return PackList(sequences, np.arange(len(sequences) + 1, dtype=np.int64), np.array(tokens, dtype=np.int64))
