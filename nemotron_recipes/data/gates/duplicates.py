"""Rows that are equal, or nearly so, to others. Training rows come first: of a training and a held-out row that are
alike, the held-out one goes, since an evaluation on it would measure memory. Nothing moves between splits.

Near-duplicates by MinHash (Broder 1997) with banding (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3).
In memory: three bytes per row (seven with `keep: longest`) and one part of the spilled bands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar

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
CHUNK = 1 << 13  # pairs looked at at once
SAMPLED_PLACES = 1 << 16
_LONGEST = np.uint32(2**24 - 1)  # tokens; what is longer counts as this long


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
            places = _Places(corpus.rows, self.settings.keep == "longest")
            with (scratch / "signatures").open("w+b") as signatures:
                bands = self._bands(corpus, scratch, signatures, places)
                edges = self._edges(bands, signatures, places, scratch)
            _decide(edges, places.held_out, marks)
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

    def _bands(self, corpus: Corpus, scratch: Path, signatures: IO[bytes], places: _Places) -> Spill:
        """(hash of a band, row) of every row; fills `signatures` and `places` on the way."""
        deep = self.rows_per_band
        count = self.settings.permutations // deep
        spill = Spill(scratch / "bands", 2, corpus.rows * count)
        start = 0
        for block in corpus.blocks():
            values = np.ascontiguousarray(block.signatures).view("<u4")
            signatures.write(values.data)
            places.fill(start, block.splits != TRAIN, values[:, -1])
            rows: np.ndarray = start + np.flatnonzero(block.alive)
            alive = values[block.alive].astype(np.uint64)
            for band in range(count):
                columns = alive[:, band * deep : (band + 1) * deep]
                key: np.ndarray = np.full(len(rows), band, dtype=np.uint64)
                for column in columns.T:
                    key = mixed(key * np.uint64(31) + column)
                spill.add(_part(key, spill.parts), np.column_stack([key, rows.astype(np.uint64)]))
            start += len(block.splits)
        signatures.flush()
        return spill

    def _edges(self, bands: Spill, signatures: IO[bytes], places: _Places, scratch: Path) -> Spill:
        """(place of the row that decides, place, other row, row) of pairs that are alike, parts by place."""
        edges = Spill(scratch / "edges", 4, places.rows)
        bounds = places.bounds(edges.parts)
        for part in bands.read():
            keys: np.ndarray = part[:, 0]
            rows: np.ndarray = part[:, 1].astype(np.int64)
            while len(rows):
                order = np.lexsort((places.of(rows), keys))
                keys, rows = keys[order], rows[order]
                fresh: np.ndarray = np.append(True, keys[1:] != keys[:-1])
                leaders = rows[np.flatnonzero(fresh)[np.cumsum(fresh) - 1]]
                keys, rows, leaders = keys[~fresh], rows[~fresh], leaders[~fresh]
                pairs, where = _distinct(leaders, rows)  # most share several bands
                alike = self._alike(signatures, pairs)
                found = pairs[alike]
                ends = places.of(found[:, 1])
                entries = np.column_stack([places.of(found[:, 0]), ends, found]).astype(np.uint64)
                edges.add(np.digitize(ends, bounds), entries)
                strange = ~alike[where]
                keys, rows = keys[strange], rows[strange]  # those may still be like each other
        return edges

    def _alike(self, signatures: IO[bytes], pairs: np.ndarray) -> np.ndarray:
        """bool [n]: the share of equal minima, which estimates the Jaccard similarity, reaches the threshold."""
        found: np.ndarray = np.empty(len(pairs), dtype=bool)
        for at in range(0, len(pairs), CHUNK):
            rows, where = np.unique(pairs[at : at + CHUNK], return_inverse=True)
            values = self._read(signatures, rows)[where.reshape(-1, 2)]
            equal = values[:, 0, :-1] == values[:, 1, :-1]
            found[at : at + CHUNK] = equal.mean(axis=1) >= self.settings.threshold
        return found

    def _read(self, signatures: IO[bytes], rows: np.ndarray) -> np.ndarray:
        """uint32 [n, minima and length]. Read, not mapped: what is mapped counts as memory of the process."""
        values: np.ndarray = np.empty((len(rows), self.width // 4), dtype="<u4")
        view = values.data.cast("B")
        for at, row in enumerate(rows.tolist()):
            os.preadv(signatures.fileno(), [view[at * self.width : (at + 1) * self.width]], row * self.width)
        return values


class _Places:
    """Where each row stands: of rows that are alike, the one with the lower place stays. Training rows come first, then
    longer ones where those are kept, then earlier ones."""

    def __init__(self, rows: int, longest: bool):
        self.rows = rows
        self.held_out: np.ndarray = np.zeros(rows, dtype=bool)
        self._lengths: np.ndarray | None = np.zeros(rows, dtype=np.uint32) if longest else None

    def fill(self, start: int, held_out: np.ndarray, lengths: np.ndarray) -> None:
        """The facts of the rows from `start` on."""
        self.held_out[start : start + len(held_out)] = held_out
        if self._lengths is not None:
            self._lengths[start : start + len(held_out)] = lengths

    def of(self, rows: np.ndarray) -> np.ndarray:
        """uint64: one bit, 24 for the length (a row of 8 MiB has fewer tokens), 39 for the number of the row."""
        place = rows.astype(np.uint64) | self.held_out[rows].astype(np.uint64) << np.uint64(63)
        if self._lengths is not None:
            short = _LONGEST - np.minimum(self._lengths[rows], _LONGEST)
            place |= short.astype(np.uint64) << np.uint64(39)
        return place

    def bounds(self, parts: int) -> np.ndarray:
        """uint64 [parts - 1], ascending: between them lie about as many rows each."""
        sample = np.sort(self.of(np.linspace(0, self.rows - 1, min(self.rows, SAMPLED_PLACES)).astype(np.int64)))
        return sample[np.arange(1, parts) * len(sample) // parts]


def _distinct(ones: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the distinct pairs int64 [n, 2], which of them each pair is)."""
    order = np.lexsort((others, ones))
    fresh: np.ndarray = np.ones(len(order), dtype=bool)
    fresh[1:] = (np.diff(ones[order]) != 0) | (np.diff(others[order]) != 0)
    where: np.ndarray = np.empty(len(order), dtype=np.int64)
    where[order] = np.cumsum(fresh) - 1
    first = order[fresh]
    return np.column_stack([ones[first], others[first]]), where


def _decide(edges: Spill, held_out: np.ndarray, marks: Marks) -> None:
    """By place: a row goes where one that stays is like it; a held-out row also where any training row is."""
    for part in edges.read():
        ordered: np.ndarray = part[np.lexsort((part[:, 0], part[:, 1])), 2:].astype(np.int64)
        for at in range(0, len(ordered), CHUNK):
            for other, row in ordered[at : at + CHUNK].tolist():
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
