"""Shards back together, in input order: corpus gates, length policy, copies by weight, and the balance of all rows.

Everything here is array work on the shards' indices; tokens stay in their spools until they are written.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from nemotron_recipes.data.gates import EXAMPLES, Block, CorpusGate
from nemotron_recipes.data.ledger import Account, BadRows
from nemotron_recipes.data.sequences import RECORD, SequenceFile
from nemotron_recipes.data.settings import SAMPLED, SPLITS, Settings
from nemotron_recipes.data.shards import Shard
from nemotron_recipes.data.splits import copies
from nemotron_recipes.data.spool import KEPT, Spool

TRAIN = SPLITS.index("train")
BINS = 32  # of the histograms of lengths
BLOCK = 1 << 14  # rows that a corpus gate sees at once


@dataclass
class Merged:
    """All shards' facts; what grows with the data lies in files below `scratch`. `accounts`: by (source, file)."""

    scratch: Path
    by_source: bool = False  # sequences of each source apart
    accounts: dict[tuple[int, int], Account] = field(default_factory=dict)
    gates: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # gate -> reason -> [rows, examples]
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # of sequences, or rows written
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # of those
    longest: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    lengths: dict[str, np.ndarray] = field(default_factory=lambda: {s: np.zeros((2, BINS), np.int64) for s in SPLITS})
    _sequences: dict[tuple[str, int], SequenceFile] = field(default_factory=dict)

    def sequences(self, split: str, source: int = 0) -> SequenceFile:
        """The sequences of a split in order; `source` matters where they are kept apart."""
        key = (split, source if self.by_source else 0)
        if key not in self._sequences:
            self._sequences[key] = SequenceFile(self.scratch / f"sequences-{key[0]}-{key[1]}")
        return self._sequences[key]

    def close(self) -> None:
        for file in self._sequences.values():
            file.close()


class Merger:
    """`shards` and `spools` in input order. `rows`: where <split>/rows.jsonl is written, by split."""

    def __init__(
        self,
        method: str,
        settings: Settings,
        names: Sequence[str],
        shards: Sequence[Shard],
        spools: Sequence[Spool],
        bad_rows: BadRows,
        rows: dict[str, IO[bytes]],
        scratch: Path,
    ):
        self.method = method
        self.settings = settings
        self.names = names
        self.shards = shards
        self.spools = spools
        self.bad_rows = bad_rows
        self.rows = rows
        self.merged = Merged(scratch, by_source=method == "pretrain")

    def run(self, gates: Sequence[CorpusGate]) -> Merged:
        """UserError: a bad row, where those end the run."""
        dropped = sweep(gates, self.shards, self.spools, self.merged.scratch, self.merged.gates)
        base, file, begin = 0, (-1, -1), 0
        for number, (shard, spool) in enumerate(zip(self.shards, self.spools, strict=True)):
            if (shard.source, shard.file) != file:
                base, file = 0, (shard.source, shard.file)
            begin += self._shard(number, shard, spool, base, dropped, begin)
            base += spool.facts["lines"]
        return self.merged

    def _shard(self, number: int, shard: Shard, spool: Spool, base: int, dropped: Dropped, begin: int) -> int:
        """`begin`: how many rows the gates have seen of the shards before; returns how many they saw of this one."""
        account = self.merged.accounts.setdefault((shard.source, shard.file), Account())
        account.read += spool.facts["rows"]
        self._note_bad(shard, spool, base)
        for gate, reasons in spool.facts["gates"].items():
            for reason, (count, examples) in reasons.items():
                note(self.merged.gates, gate, reason, count, examples)
        index = spool.index()
        reasons = spool.facts["reasons"]
        for code, count in Counter(index["status"][index["status"] != KEPT].tolist()).items():
            account.dropped[reasons[code]] += count
        alive = index["status"] == KEPT
        kept = np.flatnonzero(alive)
        why = dropped.codes[begin : begin + len(kept)]
        alive[kept[np.flatnonzero(why)]] = False
        for code, count in enumerate(np.bincount(why, minlength=1)[1:].tolist()):
            account.dropped[dropped.reasons[code]] += count
        weight = self.settings.sources[shard.source].weight if self.method in SAMPLED else 1.0
        times = np.where(index["split"] == TRAIN, copies(index["point"], weight), 1)
        written = (
            self._sequences(number, shard.source, spool, index, alive, times, account)
            if self.method in ("sft", "pretrain")
            else self._entries(index, alive, times, account)
        )
        account.written += int(written.sum())
        for code, split in enumerate(SPLITS):
            self.merged.rows[split] += int((written & (index["split"] == code)).sum())
        self._write_payload(spool, index, written, times)
        return len(kept)

    def _sequences(
        self,
        number: int,
        source: int,
        spool: Spool,
        index: dict[str, np.ndarray],
        alive: np.ndarray,
        times: np.ndarray,
        account: Account,
    ) -> np.ndarray:
        """Length policy; which rows are written."""
        # Documents stand one after another in a file, and a trainer cuts it where it likes.
        size = self.settings.pack_size if self.method == "sft" else int(index["seq_length"].max(initial=0)) + 1
        row: np.ndarray = np.repeat(np.arange(len(alive)), index["sequences"])
        length, first = index["seq_length"], index["seq_first"]
        start = np.concatenate([[0], np.cumsum(length, dtype=np.int64)])[:-1]
        if self.settings.overlong == "split":
            account.sequences_split += int((alive[row] & (length > size)).sum())
            row, start, length, first = _split(spool, size, row, start, length, first)
        overlong = length > size
        learns = (first >= 0) & (first < np.minimum(length, size) - 1)  # the last position of a sequence has no label
        cut = overlong & learns & (self.settings.overlong == "truncate")
        good = np.where(overlong, cut, learns) & alive[row]
        lost = ~good & alive[row]
        has_good, has_overlong = _any(good, row, len(alive)), _any(lost & overlong, row, len(alive))
        account.dropped["overlong"] += int((alive & ~has_good & has_overlong).sum())
        account.dropped["nothing_to_train"] += int((alive & ~has_good & ~has_overlong).sum())
        account.dropped = +account.dropped
        account.sequences_dropped["overlong"] += int((lost & overlong & has_good[row]).sum())
        account.sequences_dropped["nothing_to_train"] += int((lost & ~overlong & has_good[row]).sum())
        account.sequences_dropped = +account.sequences_dropped
        account.sequences_truncated += int((good & overlong).sum())
        chosen = np.flatnonzero(good)
        repeats = times[row[chosen]]
        account.sequences += int(repeats.sum())
        chosen = np.repeat(chosen, repeats)
        for code, split in enumerate(SPLITS):
            mine = chosen[index["split"][row[chosen]] == code]
            records: np.ndarray = np.empty(len(mine), dtype=RECORD)
            records["shard"], records["start"] = number, start[mine]
            records["length"] = np.minimum(length[mine], size)
            self.merged.sequences(split, source).add(records)
            self._measure(split, records["length"], records["length"])
        return alive & has_good

    def _entries(
        self, index: dict[str, np.ndarray], alive: np.ndarray, times: np.ndarray, account: Account
    ) -> np.ndarray:
        """Preference and RL rows: those that fit are written whole."""
        fits = alive & (index["length"] <= self.settings.pack_size)
        account.dropped["overlong"] += int((alive & ~fits).sum())
        account.dropped = +account.dropped
        account.sequences += int(times[fits].sum())
        for code, split in enumerate(SPLITS):
            mine: np.ndarray = np.repeat(np.arange(len(fits)), times * (fits & (index["split"] == code)))
            self._measure(split, index["length"][mine], index["tokens"][mine])
        return fits

    def _measure(self, split: str, lengths: np.ndarray, tokens: np.ndarray) -> None:
        merged = self.merged
        merged.counts[split] += len(lengths)
        merged.tokens[split] += int(tokens.sum(dtype=np.int64))
        merged.lengths[split] += by_length(lengths, self.settings.pack_size)
        merged.longest[split] = max(merged.longest[split], int(lengths.max(initial=0)))

    def _write_payload(
        self, spool: Spool, index: dict[str, np.ndarray], written: np.ndarray, times: np.ndarray
    ) -> None:
        ends = index["payload_end"]
        starts = np.concatenate([[0], ends])[:-1]
        with (spool.folder / "payload").open("rb") as handle:
            for row in np.flatnonzero(written & (ends > starts)).tolist():
                handle.seek(int(starts[row]))
                line = handle.read(int(ends[row] - starts[row]))
                self.rows[SPLITS[index["split"][row]]].write(line * int(times[row]))

    def _note_bad(self, shard: Shard, spool: Spool, base: int) -> None:
        with (spool.folder / "bad.jsonl").open(encoding="ascii") as handle:
            for text in handle:
                bad = json.loads(text)
                line = base + bad["line"]
                self.bad_rows.add(self.names[shard.source], shard.name, shard.place, line, bad["reason"], bad["detail"])


def _split(
    spool: Spool, size: int, row: np.ndarray, start: np.ndarray, length: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same columns with each overlong sequence as pieces of at most `size` tokens. A piece begins with the last
    token of the one before, so that every label stands in one of them."""
    counts = np.where(length > size, -(-(length - 1) // (size - 1)), 1)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    row, start, length, first, counts = (np.repeat(one, counts) for one in (row, start, length, first, counts))
    start = start + place * (size - 1)
    length = np.minimum(length - place * (size - 1), size)
    cut = np.flatnonzero(counts > 1)
    if len(cut):
        mask = np.memmap(spool.folder / "mask", dtype=np.uint8, mode="r")
        for piece in cut.tolist():
            learned = np.flatnonzero(mask[start[piece] : start[piece] + length[piece]])
            first[piece] = learned[0] if len(learned) else -1
    return row, start, length, first


class Dropped:
    """The rows that corpus gates leave out: a byte for each row that was kept till then, in input order. `starts`:
    where those of each shard begin."""

    def __init__(self, starts: np.ndarray):
        self.starts = starts
        self.codes: np.ndarray = np.zeros(int(starts[-1]), dtype=np.uint8)  # 0: stays; else 1 + index of the reason
        self.reasons: list[str] = []

    def add(self, row: int, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.codes[row] = 1 + self.reasons.index(reason)


class _Corpus:
    """What a corpus gate sees: see `gates.Corpus`."""

    def __init__(self, number: int, width: int, shards: Sequence[Shard], spools: Sequence[Spool], dropped: Dropped):
        self._number = number
        self._width = width
        self._shards = shards
        self._spools = spools
        self._dropped = dropped
        self.starts = dropped.starts
        self.rows = int(self.starts[-1])

    def blocks(self) -> Iterator[Block]:
        for place, spool in enumerate(self._spools):
            index = spool.index()
            splits = index["split"][index["status"] == KEPT].astype(np.uint8)
            path = spool.folder / f"signatures-{self._number}"
            for at in range(0, len(splits), BLOCK):
                here = splits[at : at + BLOCK]
                raw = np.fromfile(path, np.uint8, len(here) * self._width, offset=at * self._width)
                begin = int(self.starts[place]) + at
                alive = self._dropped.codes[begin : begin + len(here)] == 0
                yield Block(raw.reshape(len(here), self._width), here, alive)

    def describe(self, index: int) -> str:
        place, line = self._where(index)
        return f"{self._shards[place].name}, line {line}"

    def _where(self, index: int) -> tuple[int, int]:
        place = int(np.searchsorted(self.starts, index, side="right")) - 1
        shard, columns = self._shards[place], self._spools[place].index()
        line = int(columns["line"][columns["status"] == KEPT][index - int(self.starts[place])])
        for before, spool in zip(self._shards[:place], self._spools[:place], strict=True):
            if (before.source, before.file) == (shard.source, shard.file):
                line += spool.facts["lines"]
        return place, line


def sweep(
    gates: Sequence[CorpusGate],
    shards: Sequence[Shard],
    spools: Sequence[Spool],
    scratch: Path,
    counts: dict[str, dict[str, list[Any]]],
) -> Dropped:
    """What the gates leave out."""
    if not gates:
        return Dropped(np.zeros(1, dtype=np.int64))
    kept = [int((spool.index()["status"] == KEPT).sum()) for spool in spools]
    dropped = Dropped(np.concatenate([[0], np.cumsum(kept, dtype=np.int64)]))
    for number, gate in enumerate(gates):
        folder = scratch / f"gate-{number}"
        folder.mkdir(parents=True)
        for one in gate.sweep(_Corpus(number, gate.width, shards, spools, dropped), folder):
            dropped.add(one.index, one.reason)
            note(counts, gate.name, one.reason, 1, [one.example] if one.example else [])
        shutil.rmtree(folder)
    return dropped


def note(counts: dict[str, dict[str, list[Any]]], gate: str, reason: str, count: int, examples: Sequence[str]) -> None:
    """Add to a gate's counts; of the examples the first ones in input order stay."""
    counted = counts.setdefault(gate, {}).setdefault(reason, [0, []])
    counted[0] += count
    counted[1] += examples[: max(0, EXAMPLES - len(counted[1]))]


def by_length(lengths: np.ndarray, size: int) -> np.ndarray:
    """int64 [2, BINS]: how many of the lengths, none above `size`, fall into each of the equal bins, and their sums."""
    place = np.minimum(lengths.astype(np.int64) * BINS // size, BINS - 1)
    sums = np.bincount(place, weights=lengths, minlength=BINS).astype(np.int64)
    return np.stack([np.bincount(place, minlength=BINS), sums])


def _any(flags: np.ndarray, row: np.ndarray, rows: int) -> np.ndarray:
    """For each row whether any of its sequences has the flag."""
    return np.bincount(row[flags], minlength=rows) > 0
