"""Where curation plugs into data preparation. A gate keeps, changes or drops rows; it never moves them between splits.

Two kinds, because shards run in parallel and yet the result must not depend on how many processes there are:

- `RowGate` judges one row by itself, in the worker processes. It is pure: equal rows give equal verdicts.
- `CorpusGate` judges a row by all others (duplicates). Its `signature` is pure and runs in the worker processes; its
  `sweep` runs once, in one process, and sees the signatures of all rows in input order, as often as it likes.

Order: rows are read, normalised and placed in a split; `RowGate.check` in the configured order; rendered and encoded;
`RowGate.check_tokens`; `CorpusGate.signature`. When all shards are done: `CorpusGate.sweep`, gate after gate (a row
that one drops is not offered to the next), then copies by weight, packing, writing. A dropped row is counted under its
reason.

A gate is picklable and small: each worker process gets a copy. What it needs that is large (a language model, the
n-grams of evaluation files) it loads in `open`, once per process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from nemotron_recipes.data.rows import Row

EXAMPLES = 5  # shown per gate and reason in the report: the first ones in input order


@dataclass(frozen=True)
class Quote:
    """What an example shows of a row's text: the piece from `start` to `end`, on one line and kept short. What is
    private is taken out of the whole text first: of a number cut in two no pattern would find the rest."""

    said: str  # stands before it
    text: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Drop:
    """The row is left out. `reason` is one of the gate's closed set; `example` shows a person why (kept short; what it
    takes from the row's text is a `Quote`)."""

    reason: str
    example: str | Quote = ""


@dataclass(frozen=True)
class Change:
    """The row goes on as `row` (PII redacted). Counted under `reason`; may be returned as often as needed."""

    row: Row
    reason: str
    example: str | Quote = ""


@dataclass(frozen=True)
class Note:
    """The row goes on as it is, but is counted under `reason` (PII reported)."""

    reason: str
    example: str | Quote = ""


Verdict = Drop | Change | Note | None  # None: nothing to say


class Candidate(NamedTuple):
    """A row under judgement. `fields` is the row as it was read, with everything that `row` has no place for."""

    row: Row
    fields: dict[str, Any]
    split: str


class RowGate(Protocol):
    """Pure; runs in worker processes. `key` is what its verdicts follow from (settings, digests of files it reads)."""

    name: str

    @property
    def key(self) -> Any:
        """Plain data; a change of it makes shards that were prepared before stale."""
        ...

    def open(self) -> None:
        """Load what is large. Called once per process, before the first row. UserError: it can't be had."""
        ...

    def check(self, candidate: Candidate) -> Verdict:
        """Before the row is rendered: text, structure, other fields."""
        ...

    def check_tokens(self, candidate: Candidate, sequences: Sequence[np.ndarray]) -> Drop | Note | None:
        """After encoding: the int32 ids of what the row became (sft: its sequences; else: prompt and answers)."""
        ...


@dataclass(frozen=True)
class Block:
    """Consecutive rows in input order, as a corpus gate sees them. All have the same length n."""

    signatures: np.ndarray  # uint8 [n, width]
    splits: np.ndarray  # uint8 [n]: index into settings.SPLITS
    alive: np.ndarray  # bool [n]: not dropped by an earlier gate


class Corpus(Protocol):
    """All rows that are left, in input order; a pass over them costs a sequential read of the signatures."""

    rows: int

    def blocks(self) -> Iterator[Block]:
        """Every row once, in order, in blocks of bounded size. May be called again."""
        ...

    def describe(self, index: int) -> str:
        """`source, file, line` of a row, for examples."""
        ...


@dataclass(frozen=True)
class Swept:
    """`index` of a row that is left out, why, and an example for people."""

    index: int
    reason: str
    example: str = ""


class CorpusGate(Protocol):
    """Judges rows by each other. Memory stays bounded: what grows with the corpus lives in files below `scratch`."""

    name: str
    width: int  # bytes of a signature

    @property
    def key(self) -> Any:
        """Plain data that `signature` follows from."""
        ...

    def signature(self, candidate: Candidate, sequences: Sequence[np.ndarray]) -> bytes:
        """Pure, `width` bytes; in worker processes."""
        ...

    def sweep(self, corpus: Corpus, scratch: Path) -> Iterator[Swept]:
        """The rows to leave out, by ascending index. `scratch` is an empty folder that goes away afterwards."""
        ...


@dataclass(frozen=True)
class Gates:
    """What stands between rows and training data, in order."""

    rows: tuple[RowGate, ...] = ()
    corpus: tuple[CorpusGate, ...] = ()
