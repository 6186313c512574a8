"""Data prep's packs as a data set of AutoModel, for its packed_sequence_thd_collater. `_target_` of automodel.yaml."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_recipes.data.packed import PackedSplit

IGNORED = -100  # a label that no loss counts
PAD = 0


class PackedTensors:
    """`split` of a prepared folder. Every pack has the same length; labels are those of the next token.

    Padding is a sequence of its own at the end, without labels: attention and Mamba states never reach it.
    """

    def __init__(self, path: str, split: str, pack_size: int, tokenizer: Any = None, **unused: Any):
        self.packs = PackedSplit(Path(path) / split)
        self.pack_size = pack_size

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        pack = self.packs[index]
        ids, mask = pack["input_ids"], pack["loss_mask"]
        length, padding = len(ids), self.pack_size - len(ids)
        if padding < 0:
            raise ValueError(f"pack {index} has {length} tokens, more than {self.pack_size}")
        labels: np.ndarray = np.full(self.pack_size, IGNORED, dtype=np.int64)
        learned = np.flatnonzero(mask)
        labels[learned] = ids[learned + 1]
        ends = [*pack["seq_start_id"].tolist(), length]
        lengths = [end - start for start, end in pairwise(ends)]
        if padding:
            lengths.append(padding)
        return {
            "input_ids": [*ids.tolist(), *[PAD] * padding],
            "labels": labels.tolist(),
            "position_ids": [position for size in lengths for position in range(size)],
            "seq_lens": lengths,
            "seq_lens_padded": list(lengths),
        }
