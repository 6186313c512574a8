"""The native format of packed sequences: flat memory-mappable columns, one folder per split::

input_ids.npy     int32  all packs one after another
loss_mask.npy     uint8  as long; aligned to labels: 1 at i means that token i+1 is learned
seq_start_id.npy  int32  starts of the sequences, counted from the start of their pack
pack_offsets.npy  int64  [packs + 1] where each pack begins in input_ids
seq_offsets.npy   int64  [packs + 1] where each pack begins in seq_start_id
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

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


class Spool:
    """Sequences on disk in the order in which they came, until it is known which pack each goes to."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self._paths = (folder / "ids", folder / "mask")
        self._ids: IO[bytes] = self._paths[0].open("wb")
        self._mask: IO[bytes] = self._paths[1].open("wb")
        self.lengths: list[int] = []
        self.learned = 0  # tokens with mask 1

    def add(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """`ids` int32; `mask` uint8, label-aligned, equally long."""
        self._ids.write(ids.astype(np.int32, copy=False).tobytes())
        self._mask.write(mask.astype(np.uint8, copy=False).tobytes())
        self.lengths.append(len(ids))
        self.learned += int(mask.sum())

    def close(self) -> None:
        self._ids.close()
        self._mask.close()

    def packs(self, groups: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(input_ids, loss_mask, seq_start_id) of each group of sequences. Nothing may be added any more."""
        self.close()
        if not self.lengths:
            return
        ids: np.ndarray = np.memmap(self._paths[0], dtype=np.int32, mode="r")
        mask: np.ndarray = np.memmap(self._paths[1], dtype=np.uint8, mode="r")
        ends = np.cumsum(self.lengths, dtype=np.int64)
        for group in groups:
            spans = [(int(ends[i]) - self.lengths[i], int(ends[i])) for i in group]
            starts = np.cumsum([0] + [self.lengths[i] for i in group[:-1]], dtype=np.int32)
            yield (
                np.concatenate([ids[a:b] for a, b in spans]),
                np.concatenate([mask[a:b] for a, b in spans]),
                starts,
            )


def write_native(folder: Path, spool: Spool, groups: Sequence[Sequence[int]]) -> None:
    """One split in the native format."""
    folder.mkdir(parents=True, exist_ok=True)
    totals = [sum(spool.lengths[i] for i in group) for group in groups]
    pack_offsets = np.concatenate([[0], np.cumsum(totals)]).astype(np.int64)
    seq_offsets = np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64)
    np.save(folder / "pack_offsets.npy", pack_offsets)
    np.save(folder / "seq_offsets.npy", seq_offsets)
    sizes = {"input_ids": pack_offsets[-1], "loss_mask": pack_offsets[-1], "seq_start_id": seq_offsets[-1]}
    columns = {name: _create(folder / f"{name}.npy", COLUMNS[name], int(size)) for name, size in sizes.items()}
    for number, (ids, mask, starts) in enumerate(spool.packs(groups)):
        tokens = slice(pack_offsets[number], pack_offsets[number + 1])
        columns["input_ids"][tokens] = ids
        columns["loss_mask"][tokens] = mask
        columns["seq_start_id"][seq_offsets[number] : seq_offsets[number + 1]] = starts
    for column in columns.values():
        if isinstance(column, np.memmap):
            column.flush()


def write_megatron(path: Path, spool: Spool, groups: Sequence[Sequence[int]]) -> None:
    """One split as Megatron-Bridge's packed .npy: an object array of dicts of lists. The reader there joins lists
    (`seq_start_id + [len]`), so they must not be arrays. numpy stores this with pickle; nothing here reads it back."""
    packs: np.ndarray = np.empty(len(groups), dtype=object)
    for number, (ids, mask, starts) in enumerate(spool.packs(groups)):
        packs[number] = {"input_ids": ids.tolist(), "loss_mask": mask.tolist(), "seq_start_id": starts.tolist()}
    np.save(path, packs, allow_pickle=True)


def _create(path: Path, dtype: type, size: int) -> np.ndarray:
    if size == 0:  # a file of no bytes can't be mapped for writing
        np.save(path, np.empty(0, dtype=dtype))
        return np.empty(0, dtype=dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(size,))
