"""The splits of a merged preparation to files, in the layout that was asked for, and the facts of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from nemotron_recipes.data.indexed import slug, write_blend, write_indexed
from nemotron_recipes.data.job import Job, SplitFacts
from nemotron_recipes.data.merge import Merged
from nemotron_recipes.data.packed import PARQUET
from nemotron_recipes.data.sequences import alone, pack_sequences
from nemotron_recipes.data.settings import SPLITS
from nemotron_recipes.data.spool import Spool
from nemotron_recipes.data.writers import (
    MEGATRON_NAMES,
    PackReader,
    Packs,
    Written,
    write_megatron,
    write_native,
    write_parquet,
)


class SplitWriter:
    """Writes below `output`; what is needed meanwhile lies in `scratch`."""

    def __init__(self, job: Job, output: Path, scratch: Path):
        self.job = job
        self.output = output
        self.scratch = scratch

    def write(self, merged: Merged, spools: Sequence[Spool]) -> dict[str, SplitFacts]:
        """The facts of each split. OSError: the disk."""
        facts = {
            split: SplitFacts(
                rows=merged.rows[split],
                sequences=merged.counts[split],
                tokens=merged.tokens[split],
                longest=merged.longest[split],
                length_counts=merged.lengths[split][0].tolist(),
                length_tokens=merged.lengths[split][1].tolist(),
            )
            for split in SPLITS
        }
        if self.job.method == "sft":
            for split in SPLITS:
                self._packs(merged, spools, split, facts[split])
        elif self.job.method == "pretrain":
            self._documents(merged, spools, facts)
        return facts

    def _packs(self, merged: Merged, spools: Sequence[Spool], split: str, facts: SplitFacts) -> None:
        sequences = merged.sequences(split)
        place = self.scratch / f"packed-{split}"
        with closing(PackReader(spools, pack_sequences(sequences, self.job.settings.pack_size, place))) as packs:
            # Best-fit orders packs by the length of their first sequence; a batch should be a mixture.
            order = np.random.Generator(np.random.PCG64(0)).permutation(len(packs.tokens))
            written = self._writer(split)(packs, order)
        facts.packs = len(order)
        facts.learned_tokens = written.learned_tokens

    def _documents(self, merged: Merged, spools: Sequence[Spool], facts: dict[str, SplitFacts]) -> None:
        """One indexed data set for each source that has rows in a split: their shares are a matter of training."""
        prefixes: dict[str, list[tuple[float, str]]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            for number, source in enumerate(self.job.settings.sources):
                documents = merged.sequences(split, number)
                if not len(documents):
                    continue
                prefix = f"{split}/{number}-{slug(source.name or f'source-{number}')}_text_document"
                with closing(PackReader(spools, alone(documents))) as packs:
                    written = write_indexed(self.output / prefix, packs, np.arange(len(packs.tokens)))
                prefixes[split].append((source.weight, prefix))
                facts[split].learned_tokens += written.tokens
        write_blend(self.output, prefixes)

    def _writer(self, split: str) -> Callable[[Packs, np.ndarray], Written]:
        if self.job.settings.format == "native":
            return lambda packs, order: write_native(self.output / split, packs, order)
        if self.job.settings.format == "parquet":
            return lambda packs, order: write_parquet(self.output / split / PARQUET, packs, order)
        return lambda packs, order: write_megatron(self.output / f"{MEGATRON_NAMES[split]}.npy", packs, order)
