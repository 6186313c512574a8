"""The native format of packed sequences: flat memory-mappable columns, one folder per split::

input_ids.npy     int32  all packs one after another
loss_mask.npy     uint8  as long; aligned to labels: 1 at i means that token i+1 is learned
seq_start_id.npy  int32  starts of the sequences, counted from the start of their pack
pack_offsets.npy  int64  [packs + 1] where each pack begins in input_ids
seq_offsets.npy   int64  [packs + 1] where each pack begins in seq_start_id
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

PARQUET = "packed.idx.parquet"  # of a split, with an ending that Megatron-Bridge reads
COLUMNS = {
    "input_ids": np.int32,
    "loss_mask": np.uint8,
    "seq_start_id": np.int32,
    "pack_offsets": np.int64,
    "seq_offsets": np.int64,
}


class PackedSplit:
    """A split to read: `len()` packs; `[i]` is a dict of read-only views `input_ids`, `loss_mask`, `seq_start_id`."""

    def __init__(self, folder: Path):
        self.folder = folder
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in COLUMNS}
        for name, dtype in COLUMNS.items():
            if columns[name].dtype != dtype or columns[name].ndim != 1:
                raise ValueError(f"{folder / name}.npy is not a flat column of {np.dtype(dtype).name}")
        self.input_ids = columns["input_ids"]
        self.loss_mask = columns["loss_mask"]
        self.seq_start_id = columns["seq_start_id"]
        self.pack_offsets = columns["pack_offsets"]
        self.seq_offsets = columns["seq_offsets"]
        if len(self.loss_mask) != len(self.input_ids) or int(self.pack_offsets[-1]) != len(self.input_ids):
            raise ValueError(f"{folder}: the columns don't belong together")

    def __len__(self) -> int:
        return len(self.pack_offsets) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        index %= len(self)
        tokens = slice(int(self.pack_offsets[index]), int(self.pack_offsets[index + 1]))
        starts = slice(int(self.seq_offsets[index]), int(self.seq_offsets[index + 1]))
        return {
            "input_ids": self.input_ids[tokens],
            "loss_mask": self.loss_mask[tokens],
            "seq_start_id": self.seq_start_id[starts],
        }

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[index] for index in range(len(self)))
