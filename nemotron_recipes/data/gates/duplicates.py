"""Rows that are equal, or nearly so, to others. Training rows come first: of a training and a held-out row that are
alike, the held-out one goes, since an evaluation on it would measure memory. Nothing moves between splits.

Near-duplicates by MinHash (Broder 1997) with banding (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3).
In memory: about 30 bytes per row and one part of the spilled bands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nemotron_recipes.data.gate_settings import ExactDuplicates, NearDuplicates
from nemotron_recipes.data.gates import Candidate, Corpus, Swept
from nemotron_recipes.data.gates.spill import Marks, Spill
from nemotron_recipes.data.gates.text import mixed, ngram_hashes, said, word_hashes, words
from nemotron_recipes.data.rows import Row
from nemotron_recipes.data.settings import SPLITS
from nemotron_recipes.data.splits import digest

DUPLICATE, IN_TRAINING = "duplicate", "in_training"
NEAR_DUPLICATE, NEAR_TRAINING = "near_duplicate", "near_training"
TRAIN = SPLITS.index("train")
RECALL = 0.98  # least share of pairs right at the threshold that share a band
CHUNK = 1 << 14  # pairs compared at once


@dataclass(frozen=True)
class ExactGate:
    """Reasons: duplicate (of an earlier row), in_training (a held-out row that training has)."""

    settings: ExactDuplicates
    name: ClassVar[str] = "exact_duplicates"
    width: ClassVar[int] = 16

    @property
    def key(self) -> Any:
        return asdict(self.settings)

    def signature(self, candidate: Candidate, sequences: Sequence[np.ndarray]) -> bytes:
        row = candidate.row
        if self.settings.by == "prompt":
            return digest([row.tools, _asked(row)])[: self.width]
        return digest([value for name, value in vars(row).items() if name != "extra"])[: self.width]

    def sweep(self, corpus: Corpus, scratch: Path) -> Iterator[Swept]:
        marks = Marks(corpus.rows, (DUPLICATE, IN_TRAINING))
        held_out: np.ndarray = np.zeros(corpus.rows, dtype=bool)
        spill = Spill(scratch / "digests", 3, corpus.rows)
        start = 0
        for block in corpus.blocks():
            rows: np.ndarray = start + np.flatnonzero(block.alive)
            held_out[start : start + len(block.splits)] = block.splits != TRAIN
            keys = np.ascontiguousarray(block.signatures[block.alive]).view("<u8")
            spill.add(_part(keys[:, 0], spill.parts), np.column_stack([keys, rows.astype(np.uint64)]))
            start += len(block.splits)
        for low, high, row in (part.T for part in spill.read()):
            rows = row.astype(np.int64)
            order = np.lexsort((rows, held_out[rows], low, high))
            low, high, rows = low[order], high[order], rows[order]
            fresh: np.ndarray = np.ones(len(rows), dtype=bool)
            fresh[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
            firsts = rows[np.flatnonzero(fresh)[np.cumsum(fresh) - 1]]  # of each row's group
            leaked = ~fresh & held_out[rows] & ~held_out[firsts]
            again = ~fresh & ~leaked
            marks.add(DUPLICATE, rows[again], firsts[again])
            marks.add(IN_TRAINING, rows[leaked], firsts[leaked])
        return marks.swept(corpus)


@dataclass(frozen=True)
class NearGate:
    """Reasons: near_duplicate (of a row that stays), near_training (a held-out row that is like a training row)."""

    settings: NearDuplicates
    name: ClassVar[str] = "near_duplicates"

    @property
    def key(self) -> Any:
        # threshold and keep act on finished signatures
        return [self.settings.of, self.settings.ngram, self.settings.permutations]

    @property
    def width(self) -> int:
        return 4 * (self.settings.permutations + 1)  # the minima, and how long the row is

    def signature(self, candidate: Candidate, sequences: Sequence[np.ndarray]) -> bytes:
        if self.settings.of == "tokens":
            units: list[np.ndarray] = [one.astype(np.uint64) for one in sequences]
        else:
            units = [word_hashes(words(text)) for text in said(candidate.row, ("user", "assistant", "tool"))]
        length = sum(map(len, units))
        grams = [ngram_hashes(one, min(self.settings.ngram, len(one))) for one in units if len(one)]
        minima = self._minima(np.concatenate(grams)) if grams else np.zeros(self.settings.permutations, np.uint32)
        return np.append(minima, np.uint32(min(length, 2**32 - 1))).astype("<u4").tobytes()

    def sweep(self, corpus: Corpus, scratch: Path) -> Iterator[Swept]:
        marks = Marks(corpus.rows, (NEAR_DUPLICATE, NEAR_TRAINING))
        if corpus.rows:
            signatures = np.memmap(scratch / "signatures", np.uint32, "w+", shape=(corpus.rows, self.width // 4))
            held_out: np.ndarray = np.zeros(corpus.rows, dtype=bool)
            bands = self._bands(corpus, scratch, signatures, held_out)
            rank = self._rank(signatures, held_out)
            edges = self._edges(bands, signatures, rank, scratch)
            _decide(edges, held_out, marks)
        return marks.swept(corpus)

    def _minima(self, grams: np.ndarray) -> np.ndarray:
        """uint32 [permutations]: the least value of each hash function over the n-grams. The functions are a * x + b
        modulo 2**32 with odd a, permutations of x, which is well mixed already; 32 bits are what CPUs multiply fast."""
        factors, shifts = self._functions
        small = np.unique(grams >> np.uint64(32)).astype(np.uint32)
        lowest: np.ndarray = np.full(len(factors), 2**32 - 1, dtype=np.uint32)
        for at in range(0, len(small), 1024):
            values = np.multiply.outer(factors, small[at : at + 1024])
            values += shifts[:, None]
            np.minimum(lowest, values.min(axis=1), out=lowest)
        return lowest

    @cached_property
    def _functions(self) -> tuple[np.ndarray, np.ndarray]:
        counter: np.ndarray = np.arange(1, 2 * self.settings.permutations + 1, dtype=np.uint64)
        numbers: np.ndarray = mixed(counter * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint32)
        return numbers[: self.settings.permutations] | np.uint32(1), numbers[self.settings.permutations :]

    @property
    def rows_per_band(self) -> int:
        """As many as leave RECALL of the pairs at the threshold with a band in common: fewer pairs to compare."""
        count = self.settings.permutations
        fits = [r for r in range(1, count + 1) if 1 - (1 - self.settings.threshold**r) ** (count // r) >= RECALL]
        return max(fits)

    def _bands(self, corpus: Corpus, scratch: Path, signatures: np.ndarray, held_out: np.ndarray) -> Spill:
        """(hash of a band, row) of every row; fills the arrays on the way."""
        deep = self.rows_per_band
        count = self.settings.permutations // deep
        spill = Spill(scratch / "bands", 2, corpus.rows * count)
        start = 0
        for block in corpus.blocks():
            end = start + len(block.splits)
            held_out[start:end] = block.splits != TRAIN
            values = np.ascontiguousarray(block.signatures).view("<u4")
            signatures[start:end] = values
            rows: np.ndarray = start + np.flatnonzero(block.alive)
            alive = values[block.alive].astype(np.uint64)
            for band in range(count):
                columns = alive[:, band * deep : (band + 1) * deep]
                key: np.ndarray = np.full(len(rows), band, dtype=np.uint64)
                for column in columns.T:
                    key = mixed(key * np.uint64(31) + column)
                spill.add(_part(key, spill.parts), np.column_stack([key, rows.astype(np.uint64)]))
            start = end
        return spill

    def _rank(self, signatures: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Place of each row: of rows that are alike, the one with the lower place stays."""
        rows = np.arange(len(held_out))
        length: np.ndarray = np.zeros(len(rows), dtype=np.int64)
        if self.settings.keep == "longest":
            length = signatures[:, -1].astype(np.int64)
        rank: np.ndarray = np.empty(len(rows), dtype=np.int64)
        rank[np.lexsort((rows, -length, held_out))] = rows
        return rank

    def _edges(self, bands: Spill, signatures: np.ndarray, rank: np.ndarray, scratch: Path) -> Spill:
        """(place of the row that decides, place, other row, row) of pairs that are alike, parts by place."""
        edges = Spill(scratch / "edges", 4, len(rank))
        for part in bands.read():
            keys: np.ndarray = part[:, 0]
            rows: np.ndarray = part[:, 1].astype(np.int64)
            while len(rows):
                order = np.lexsort((rank[rows], keys))
                keys, rows = keys[order], rows[order]
                fresh: np.ndarray = np.append(True, keys[1:] != keys[:-1])
                leaders = rows[np.flatnonzero(fresh)[np.cumsum(fresh) - 1]]
                keys, rows, leaders = keys[~fresh], rows[~fresh], leaders[~fresh]
                alike = self._alike(signatures, leaders, rows)
                pairs = np.unique(np.column_stack([leaders[alike], rows[alike]]), axis=0)
                places = np.column_stack([rank[pairs[:, 0]], rank[pairs[:, 1]], pairs]).astype(np.uint64)
                edges.add(places[:, 1].astype(np.int64) * edges.parts // len(rank), places)
                keys, rows = keys[~alike], rows[~alike]  # those may still be like each other
        return edges

    def _alike(self, signatures: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """bool [n]: the share of equal minima, which estimates the Jaccard similarity, reaches the threshold."""
        found: np.ndarray = np.empty(len(one), dtype=bool)
        for at in range(0, len(one), CHUNK):
            here = slice(at, at + CHUNK)
            equal = signatures[one[here], :-1] == signatures[other[here], :-1]
            found[here] = equal.mean(axis=1) >= self.settings.threshold
        return found


def _decide(edges: Spill, held_out: np.ndarray, marks: Marks) -> None:
    """By place: a row goes where one that stays is like it; a held-out row also where any training row is."""
    for part in edges.read():
        for _, _, other, row in part[np.lexsort((part[:, 0], part[:, 1]))].astype(np.int64).tolist():
            leaked = held_out[row] and not held_out[other]
            if marks.of[row] == 0 and (leaked or marks.of[other] == 0):
                marks.add(NEAR_TRAINING if leaked else NEAR_DUPLICATE, np.array([row]), np.array([other]))


def _asked(row: Row) -> list[dict[str, Any]]:
    """The prompt; of a conversation what stands before its last answer; a document."""
    if row.text is not None:
        return [{"text": row.text}]
    if row.prompt:
        return row.prompt
    answered = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
    return row.messages[:answered]


def _part(keys: np.ndarray, parts: int) -> np.ndarray:
    return (mixed(keys) % np.uint64(parts)).astype(np.int64)
