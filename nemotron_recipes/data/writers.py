"""Packed sequences to files: native columns, parquet, Megatron-Bridge's .npy. Memory doesn't grow with the data."""

from __future__ import annotations

import os
import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from nemotron_recipes.data.packed import COLUMNS
from nemotron_recipes.data.sequences import PackList
from nemotron_recipes.data.spool import Spool

MEGATRON_NAMES = {"train": "training", "validation": "validation", "test": "test"}
OPEN_SPOOLS = 64
ROW_GROUP = 1000  # packs
GROUP = 1 << 20  # tokens that are read at once


@dataclass
class Written:
    """Facts of a written split."""

    tokens: int = 0
    learned_tokens: int = 0

    def add(self, ids: np.ndarray, mask: np.ndarray) -> None:
        self.tokens += len(ids)
        self.learned_tokens += int(np.count_nonzero(mask))


class Packs(Protocol):
    """What writers read: packs in the packing's own order. `tokens` (int64): of each pack; `offsets` (int64
    [packs + 1]): where each begins among all sequences."""

    tokens: np.ndarray
    offsets: np.ndarray

    def read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input_ids int32, loss_mask uint8, seq_start_id int32) of packs [first, last), one pack after another; the
        starts count from the start of their pack."""
        ...


class PackReader:
    """The packs of a split from the spools. Reads stay near one another while packs are asked for in window order."""

    def __init__(self, spools: Sequence[Spool], packs: PackList):
        self._spools = spools
        self._sequences = packs.sequences
        self.tokens, self.offsets = packs.tokens, packs.offsets
        self._open: dict[int, tuple[IO[bytes], IO[bytes]]] = {}

    def read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Packs`."""
        records = self._sequences.read(int(self.offsets[first]), int(self.offsets[last]))
        ends = np.cumsum(records["length"], dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        ids: np.ndarray = np.empty(total, dtype=np.int32)
        mask: np.ndarray = np.empty(total, dtype=np.uint8)
        places = zip(records["shard"].tolist(), records["start"].tolist(), ends.tolist(), strict=True)
        at = 0
        ids_view, mask_view = ids.data.cast("B"), mask.data
        for shard, start, end in places:
            ids_file, mask_file = self._files(shard)
            _read(ids_file, 4 * start, ids_view[4 * at : 4 * end])
            _read(mask_file, start, mask_view[at:end])
            at = end
        mask[ends - 1] = 0  # a cut sequence has no label behind its last token
        return ids, mask, starts_in_packs(records["length"], self.tokens[first:last], self.offsets[first:last])

    def close(self) -> None:
        for pair in self._open.values():
            for handle in pair:
                handle.close()
        self._open.clear()

    def _files(self, shard: int) -> tuple[IO[bytes], IO[bytes]]:
        pair = self._open.get(shard)
        if pair is None:
            if len(self._open) >= OPEN_SPOOLS:
                for handle in self._open.pop(next(iter(self._open))):
                    handle.close()
            folder = self._spools[shard].folder
            pair = self._open[shard] = ((folder / "ids").open("rb", 0), (folder / "mask").open("rb", 0))
        return pair


def _read(handle: IO[bytes], offset: int, into: memoryview) -> None:
    if os.preadv(handle.fileno(), [into], offset) != len(into):
        raise OSError(f"{handle.name} ends too early")


def starts_in_packs(lengths: np.ndarray, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int32: where each sequence begins in its pack. `tokens`, `offsets`: of packs that follow one another."""
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    counts: np.ndarray = (
        np.diff(np.append(offsets, offsets[0] + len(lengths))) if len(offsets) else np.empty(0, np.int64)
    )
    return (begins - np.repeat(np.cumsum(tokens) - tokens, counts)).astype(np.int32)


def groups(tokens: np.ndarray) -> Iterator[tuple[int, int]]:
    """Packs that follow one another as [first, last), each time about GROUP tokens."""
    first = 0
    ends = np.cumsum(tokens, dtype=np.int64)
    while first < len(tokens):
        begun = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, begun + GROUP, side="right")), first + 1)
        yield first, last
        first = last


def write_native(folder: Path, packs: Packs, order: np.ndarray) -> Written:
    """One split in the native format. `order`: which pack comes where. Packs are read in their own order, and each is
    written to its place."""
    folder.mkdir(parents=True, exist_ok=True)
    counts: np.ndarray = np.diff(packs.offsets)
    pack_offsets = np.concatenate([[0], np.cumsum(packs.tokens[order], dtype=np.int64)]).astype(np.int64)
    seq_offsets = np.concatenate([[0], np.cumsum(counts[order], dtype=np.int64)]).astype(np.int64)
    np.save(folder / "pack_offsets.npy", pack_offsets)
    np.save(folder / "seq_offsets.npy", seq_offsets)
    sizes = {"input_ids": pack_offsets[-1], "loss_mask": pack_offsets[-1], "seq_start_id": seq_offsets[-1]}
    place: np.ndarray = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    written = Written()
    columns = {name: _Column(folder / f"{name}.npy", COLUMNS[name], int(size)) for name, size in sizes.items()}
    try:
        for first, last in groups(packs.tokens):
            ids, mask, starts = packs.read(first, last)
            to = place[first:last]
            columns["input_ids"].put(pack_offsets[to], packs.tokens[first:last], ids)
            columns["loss_mask"].put(pack_offsets[to], packs.tokens[first:last], mask)
            columns["seq_start_id"].put(seq_offsets[to], counts[first:last], starts)
            written.add(ids, mask)
    finally:
        for column in columns.values():
            column.close()
    return written


def write_columns(folder: Path, packs: Iterable[Sequence[np.ndarray]], tokens: int, sequences: int) -> None:
    """One split in the native format, of packs (input_ids, loss_mask, seq_start_id) as they come. ValueError: they
    don't hold so many tokens and sequences, or their columns don't belong together."""
    folder.mkdir(parents=True)
    sizes = {"input_ids": tokens, "loss_mask": tokens, "seq_start_id": sequences}
    columns = [_Column(folder / f"{name}.npy", COLUMNS[name], size) for name, size in sizes.items()]
    pack_offsets, seq_offsets = array("q", [0]), array("q", [0])
    try:
        for pack in packs:
            ids, mask, starts = pack
            if len(mask) != len(ids) or not len(starts) or starts[0] != 0:
                raise ValueError("the columns of a pack don't belong together")
            places = (pack_offsets[-1], pack_offsets[-1], seq_offsets[-1])
            for column, place, values in zip(columns, places, pack, strict=True):
                column.put(np.array([place]), np.array([len(values)]), values)
            pack_offsets.append(pack_offsets[-1] + len(ids))
            seq_offsets.append(seq_offsets[-1] + len(starts))
    finally:
        for column in columns:
            column.close()
    if (pack_offsets[-1], seq_offsets[-1]) != (tokens, sequences):
        found = f"{pack_offsets[-1]} tokens in {seq_offsets[-1]} sequences"
        raise ValueError(f"{found}, and metadata.json says {tokens} in {sequences}")
    np.save(folder / "pack_offsets.npy", np.array(pack_offsets, dtype=np.int64))
    np.save(folder / "seq_offsets.npy", np.array(seq_offsets, dtype=np.int64))


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

    def put(self, places: np.ndarray, counts: np.ndarray, values: np.ndarray) -> None:
        """The next `counts` of the values to each of the places."""
        view, done = memoryview(np.ascontiguousarray(values)).cast("B"), 0
        offsets: np.ndarray = self._start + places * self._width
        sizes: np.ndarray = counts * self._width
        for offset, count in zip(offsets.tolist(), sizes.tolist(), strict=True):
            self._write(view[done : done + count], offset)
            done += count

    def _write(self, view: memoryview, offset: int) -> None:
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
            group = [packs.read(number, number + 1) for number in order[start : start + ROW_GROUP].tolist()]
            arrays = []
            for column, kind in zip(zip(*group, strict=True), kinds.values(), strict=True):
                offsets = np.concatenate([[0], np.cumsum([len(one) for one in column])]).astype(np.int32)
                values = pyarrow.array(np.concatenate(column), type=kind)
                arrays.append(pyarrow.ListArray.from_arrays(pyarrow.array(offsets, type=pyarrow.int32()), values))
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), row_group_size=ROW_GROUP)
            for ids, mask, _ in group:
                written.add(ids, mask)
    return written


def write_megatron(path: Path, packs: Packs, order: np.ndarray) -> Written:
    """One split as Megatron-Bridge's packed .npy: an object array of dicts of lists. The reader there joins lists
    (`seq_start_id + [len]`), so they must not be arrays. numpy stores this with pickle; nothing here reads it back.

    The same stream as `np.save` writes, but pack by pack: numpy would hold all of them as Python objects."""
    written = Written()

    def dicts() -> Iterator[dict[str, list[int]]]:
        for number in order.tolist():
            ids, mask, starts = packs.read(number, number + 1)
            written.add(ids, mask)
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
