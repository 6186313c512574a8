"""Packed sequences to files: native columns, parquet, Megatron-Bridge's .npy. Memory doesn't grow with the data."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from nemotron_recipes.data.merge import Sequences
from nemotron_recipes.data.packed import COLUMNS
from nemotron_recipes.data.packing import Packing
from nemotron_recipes.data.spool import Spool

OPEN_SPOOLS = 64
ROW_GROUP = 1000  # packs


@dataclass
class Written:
    """Facts of a written split."""

    tokens: int = 0
    learned_tokens: int = 0


class Packs(Protocol):
    """What writers read."""

    packing: Packing

    def pack(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input_ids int32, loss_mask uint8, seq_start_id int32) of pack `number` in the packing's own order."""
        ...


class PackReader:
    """The packs of a split from the spools. Reads stay near one another while packs are asked for in window order."""

    def __init__(self, spools: list[Spool], sequences: Sequences, packing: Packing):
        self._spools = spools
        self._sequences = sequences
        self.packing = packing
        self._open: dict[int, tuple[IO[bytes], IO[bytes]]] = {}

    def pack(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input_ids int32, loss_mask uint8, seq_start_id int32) of pack `number` in the packing's own order."""
        members = self.packing.members(number)
        lengths = self._sequences.length[members]
        starts = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int32)
        total = int(lengths.sum())
        ids: np.ndarray = np.empty(total, dtype=np.int32)
        mask: np.ndarray = np.empty(total, dtype=np.uint8)
        for member, at, length in zip(members.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            ids_file, mask_file = self._files(int(self._sequences.shard[member]))
            position = int(self._sequences.start[member])
            _read(ids_file, 4 * position, ids[at : at + length])
            _read(mask_file, position, mask[at : at + length])
            mask[at + length - 1] = 0  # a cut sequence has no label behind its last token
        return ids, mask, starts

    def close(self) -> None:
        for pair in self._open.values():
            for handle in pair:
                handle.close()
        self._open.clear()

    def _files(self, shard: int) -> tuple[IO[bytes], IO[bytes]]:
        if shard not in self._open:
            if len(self._open) >= OPEN_SPOOLS:
                for handle in self._open.pop(next(iter(self._open))):
                    handle.close()
            folder = self._spools[shard].folder
            self._open[shard] = ((folder / "ids").open("rb"), (folder / "mask").open("rb"))
        return self._open[shard]


def _read(handle: IO[bytes], offset: int, into: np.ndarray) -> None:
    if os.preadv(handle.fileno(), [into.data], offset) != into.nbytes:
        raise OSError(f"{handle.name} ends too early")


def write_native(folder: Path, packs: Packs, order: np.ndarray) -> Written:
    """One split in the native format. `order`: which pack comes where. Packs are read in their own order, and each is
    written to its place."""
    folder.mkdir(parents=True, exist_ok=True)
    packing = packs.packing
    tokens, counts = packing.tokens[order], packing.counts[order]
    pack_offsets = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)]).astype(np.int64)
    seq_offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    np.save(folder / "pack_offsets.npy", pack_offsets)
    np.save(folder / "seq_offsets.npy", seq_offsets)
    sizes = {"input_ids": pack_offsets[-1], "loss_mask": pack_offsets[-1], "seq_start_id": seq_offsets[-1]}
    place: np.ndarray = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    written = Written()
    columns = {name: _Column(folder / f"{name}.npy", COLUMNS[name], int(size)) for name, size in sizes.items()}
    try:
        for number in range(len(order)):
            ids, mask, starts = packs.pack(number)
            at = int(place[number])
            columns["input_ids"].put(int(pack_offsets[at]), ids)
            columns["loss_mask"].put(int(pack_offsets[at]), mask)
            columns["seq_start_id"].put(int(seq_offsets[at]), starts)
            written.tokens += len(ids)
            written.learned_tokens += int(mask.sum())
    finally:
        for column in columns.values():
            column.close()
    return written


class _Column:
    """A .npy file of known length whose parts are written in any order."""

    def __init__(self, path: Path, dtype: type, size: int):
        self._handle = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(self._handle, header)
        self._handle.flush()
        self._start = self._handle.tell()
        self._width = np.dtype(dtype).itemsize
        self._handle.truncate(self._start + size * self._width)

    def put(self, index: int, values: np.ndarray) -> None:
        view, offset = np.ascontiguousarray(values).data.cast("B"), self._start + index * self._width
        while view:
            count = os.pwrite(self._handle.fileno(), view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        self._handle.close()


def write_parquet(path: Path, packs: Packs, order: np.ndarray) -> Written:
    """One split as the parquet that Megatron-Bridge reads: list columns input_ids, loss_mask, seq_start_id."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"input_ids": pyarrow.int32(), "loss_mask": pyarrow.uint8(), "seq_start_id": pyarrow.int32()}
    schema = pyarrow.schema([(name, pyarrow.list_(kind)) for name, kind in kinds.items()])
    written = Written()
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for start in range(0, len(order), ROW_GROUP):
            group = [packs.pack(int(number)) for number in order[start : start + ROW_GROUP]]
            arrays = []
            for column, kind in zip(zip(*group, strict=True), kinds.values(), strict=True):
                offsets = np.concatenate([[0], np.cumsum([len(one) for one in column])]).astype(np.int32)
                values = pyarrow.array(np.concatenate(column), type=kind)
                arrays.append(pyarrow.ListArray.from_arrays(pyarrow.array(offsets, type=pyarrow.int32()), values))
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), row_group_size=ROW_GROUP)
            written.tokens += sum(len(ids) for ids, _, _ in group)
            written.learned_tokens += sum(int(mask.sum()) for _, mask, _ in group)
    return written


def write_megatron(path: Path, packs: Packs, order: np.ndarray) -> Written:
    """One split as Megatron-Bridge's packed .npy: an object array of dicts of lists. The reader there joins lists
    (`seq_start_id + [len]`), so they must not be arrays. numpy stores this with pickle; nothing here reads it back.

    The same stream as `np.save` writes, but pack by pack: numpy would hold all of them as Python objects."""
    written = Written()

    def dicts() -> Iterator[dict[str, list[int]]]:
        for number in order.tolist():
            ids, mask, starts = packs.pack(number)
            written.tokens += len(ids)
            written.learned_tokens += int(mask.sum())
            yield {"input_ids": ids.tolist(), "loss_mask": mask.tolist(), "seq_start_id": starts.tolist()}

    with path.open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, {"descr": "|O", "fortran_order": False, "shape": (len(order),)})
        pickler = pickle.Pickler(handle, protocol=4)
        pickler.fast = True  # no memo: it would keep every pack
        pickler.dump(_ObjectArray(len(order), dicts()))
    return written


class _ObjectArray:
    """Pickles as the numpy object array of what an iterator gives."""

    def __init__(self, size: int, items: Iterator[Any]):
        self._size = size
        self._items = items

    def __reduce__(self) -> tuple[Any, ...]:
        empty: tuple[Any, ...] = np.empty(0, dtype=object).__reduce__()  # type: ignore[assignment]
        return empty[0], empty[1], (1, (self._size,), np.dtype(object), False, _List(self._items))


class _List:
    """Pickles as a list, item by item."""

    def __init__(self, items: Iterator[Any]):
        self._items = items

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (), None, self._items
