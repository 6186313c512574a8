"""Numbers beyond memory: entries in files by part, to be loaded one part at a time; and what became of each row."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from nemotron_recipes.data.gates import EXAMPLES, Corpus, Swept

PART_BYTES = 16 << 20  # of a part, roughly: what one is loaded and sorted in takes about five times that
MOST_PARTS = 500  # files that are open at once; from 8 GiB on parts grow instead
_ROWS = 1 << 16  # looked at at once


class Spill:
    """Rows of `width` uint64 numbers, spread over files. At most `entries` are expected."""

    def __init__(self, folder: Path, width: int, entries: int):
        folder.mkdir()
        self.parts = min(max(1, -(-entries * width * 8 // PART_BYTES)), MOST_PARTS)
        self._width = width
        self._files: list[IO[bytes]] = [(folder / str(part)).open("wb") for part in range(self.parts)]

    def add(self, part: np.ndarray, entries: np.ndarray) -> None:
        """`entries` uint64 [n, width] to the parts named, int [n]."""
        order = np.argsort(part, kind="stable")
        ends: list[int] = np.bincount(part, minlength=self.parts).cumsum().tolist()
        begin = 0
        for number, end in enumerate(ends):
            if end > begin:
                self._files[number].write(entries[order[begin:end]].astype("<u8", copy=False).tobytes())
            begin = end

    def read(self) -> Iterator[np.ndarray]:
        """Each part, uint64 [n, width], in the order of part numbers. Its file is gone afterwards."""
        for handle in self._files:
            handle.close()
        for handle in self._files:
            path = Path(handle.name)
            yield np.fromfile(path, dtype="<u8").reshape(-1, self._width)
            path.unlink()


class Marks:
    """Which rows are left out, why, and because of which other row: a byte per row, and the first few as examples."""

    def __init__(self, rows: int, reasons: tuple[str, ...]):
        self.reasons = reasons
        self.of: np.ndarray = np.zeros(rows, dtype=np.uint8)  # 1 + index of the reason; 0: the row stays
        self._first: list[list[tuple[int, int]]] = [[] for _ in reasons]  # heaps of (-row, other row)

    def add(self, reason: str, rows: np.ndarray, others: np.ndarray) -> None:
        code = self.reasons.index(reason)
        self.of[rows] = code + 1
        first = np.argsort(rows, kind="stable")[:EXAMPLES]
        for row, other in zip(rows[first].tolist(), others[first].tolist(), strict=True):
            heapq.heappush(self._first[code], (-row, other))
            if len(self._first[code]) > EXAMPLES:
                heapq.heappop(self._first[code])

    def swept(self, corpus: Corpus) -> Iterator[Swept]:
        """By ascending row."""
        examples = {-row: other for heap in self._first for row, other in heap}
        for start in range(0, len(self.of), _ROWS):
            for row in (start + np.flatnonzero(self.of[start : start + _ROWS])).tolist():
                example = f"{corpus.describe(row)}: like {corpus.describe(examples[row])}" if row in examples else ""
                yield Swept(row, self.reasons[self.of[row] - 1], example)
