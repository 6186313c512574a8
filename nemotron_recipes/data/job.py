"""What is asked of data preparation, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_recipes.data.encoder import Encoder
from nemotron_recipes.data.gates import Gates
from nemotron_recipes.data.ledger import Account
from nemotron_recipes.data.settings import Settings


@dataclass(frozen=True)
class Hub:
    """A data set on the hub at one commit."""

    name: str
    revision: str | None


@dataclass(frozen=True)
class Job:
    """What to prepare. `locations`: for each source a path or address (file, folder, glob), a Hub, or None for a
    sample. `spools`: a folder that outlives this run; None: what is prepared serves this run alone."""

    method: str
    settings: Settings
    locations: tuple[Path | str | Hub | None, ...]
    tokenizer: Path  # folder
    template_source: str
    gates: Gates = field(default_factory=Gates)
    spools: Path | None = None


@dataclass
class SplitFacts:
    """What a split holds."""

    rows: int = 0
    sequences: int = 0
    packs: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0  # tokens of the longest sequence; of preference and RL rows: of prompt and answer together
    length_counts: list[int] = field(default_factory=list)  # sequences by length, in equal bins up to pack_size
    length_tokens: list[int] = field(default_factory=list)  # their tokens


@dataclass(frozen=True)
class Report:
    """The facts of a finished preparation. `sources`: name, files with their identity and counts, and the counts.
    `gates`: gate -> reason -> [rows, examples]. `gate_seconds` (CPU), `warnings` and `reused` (shards) are of this run
    alone."""

    sources: tuple[dict[str, Any], ...]
    total: Account
    splits: dict[str, SplitFacts]
    encoder: Encoder
    bad_rows: int
    gates: dict[str, dict[str, list[Any]]]
    gate_seconds: dict[str, float]
    warnings: tuple[str, ...]
    reused: int


@dataclass(frozen=True)
class PartDone:
    """What `prepare_part` did: `shards` of `of` shards, with `rows` rows; `reused`: shards that were there before."""

    shards: int
    of: int
    rows: int
    reused: int


class Progress:
    """Hears how far it is; this one says nothing."""

    def update(self, rows: int, share: float) -> None:
        """`rows` prepared in this run; `share` of all input, 0 to 1."""

    def note(self, text: str) -> None:
        """Something to know, such as waiting for another run."""
