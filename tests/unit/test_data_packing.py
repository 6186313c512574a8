"""Packing loses nothing, never overfills, and packs well; what is written is what is read."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_recipes.data.packed import PackedSplit
from nemotron_recipes.data.packing import pack
from nemotron_recipes.data.sequences import RECORD, PackList, SequenceFile
from nemotron_recipes.data.spool import Spool, SpoolWriter, Tally
from nemotron_recipes.data.writers import PackReader, write_megatron, write_native, write_parquet


@given(
    lengths=st.lists(st.integers(1, 50), max_size=200),
    capacity=st.integers(50, 120),
    window=st.sampled_from([1, 7, 10_000]),
)
def test_nothing_is_lost_and_no_pack_is_overfull(lengths: list[int], capacity: int, window: int) -> None:
    packs = pack(lengths, capacity, window)
    assert sorted(index for group in packs for index in group) == list(range(len(lengths)))
    assert all(group and sum(lengths[i] for i in group) <= capacity for group in packs)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_at_most_one_pack_is_less_than_half_full(lengths: list[int]) -> None:
    sums = [sum(lengths[i] for i in group) for group in pack(lengths, 50)]
    assert sum(total * 2 <= 50 for total in sums) <= 1  # else two of them would have been one


def test_perfect_pairs_are_found() -> None:
    assert pack([3, 7, 6, 4], 10) == [[1, 0], [2, 3]]


@pytest.mark.parametrize("length", [0, 11])
def test_what_can_not_be_packed_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="a pack holds 10"):
        pack([3, length], 10)


def lines_run(lengths: list[int], capacity: int) -> int:
    """How many lines of Python it takes to pack them."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        packs = pack(lengths, capacity)
    finally:
        sys.settrace(before)
    assert len(packs) == len(lengths)
    return count


def test_the_cost_does_not_grow_with_the_number_of_packs() -> None:
    """Sequences of which no two fit together: a search through all packs would take four times as long for twice."""
    lengths = np.random.default_rng(0).integers(2100, 4096, 4_000).tolist()
    assert lines_run(lengths, 4096) < 2.2 * lines_run(lengths[:2_000], 4096)


def filled(folder: Path, lengths: list[int], groups: list[list[int]]) -> PackReader:
    """Sequences of n times the number n, every other token learned, in one spool."""
    writer = SpoolWriter(folder, "spool", 0)
    for number, length in enumerate(lengths):
        mask = np.arange(length, dtype=np.uint8) % 2
        mask[-1] = 0
        writer.keep(number, 0, 0.0, [(np.full(length, number, dtype=np.int32), mask.tobytes())], b"", 0, 0, [])
    writer.finish(Tally())
    starts = np.concatenate([[0], np.cumsum(lengths)])
    records = np.array([(0, lengths[i], starts[i]) for group in groups for i in group], dtype=RECORD)
    sequences = SequenceFile(folder / "sequences")
    sequences.add(records)
    offsets = np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64)
    tokens = np.array([sum(lengths[index] for index in group) for group in groups], dtype=np.int64)
    return PackReader([Spool(folder / "spool")], PackList(sequences, offsets, tokens))


def test_native_columns(tmp_path: Path) -> None:
    packs = filled(tmp_path / "spools", [2, 3, 1], [[1, 0], [2]])
    facts = write_native(tmp_path / "train", packs, np.array([1, 0]))
    assert (facts.tokens, facts.learned_tokens) == (6, 1)
    split = PackedSplit(tmp_path / "train")
    assert len(split) == 2
    read = [{name: column.tolist() for name, column in one.items()} for one in split]
    assert read == [
        {"input_ids": [2], "loss_mask": [0], "seq_start_id": [0]},
        {"input_ids": [1, 1, 1, 0, 0], "loss_mask": [0, 1, 0, 0, 0], "seq_start_id": [0, 3]},
    ]
    assert {name: column.dtype.name for name, column in split[-1].items()} == {
        "input_ids": "int32",
        "loss_mask": "uint8",
        "seq_start_id": "int32",
    }
    with pytest.raises(IndexError):
        split[2]
    with pytest.raises(ValueError, match="read-only"):
        split[0]["input_ids"][0] = 1


def test_the_columns_are_as_numpy_writes_them(tmp_path: Path) -> None:
    write_native(tmp_path / "train", filled(tmp_path / "spools", [2, 3], [[0], [1]]), np.array([0, 1]))
    for path in (tmp_path / "train").iterdir():
        np.save(tmp_path / "again.npy", np.load(path, allow_pickle=False))
        assert path.read_bytes() == (tmp_path / "again.npy").read_bytes()


def test_an_empty_split(tmp_path: Path) -> None:
    write_native(tmp_path / "test", filled(tmp_path / "spools", [], []), np.empty(0, dtype=np.int64))
    assert list(PackedSplit(tmp_path / "test")) == []


def test_columns_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_native(tmp_path / "a", filled(tmp_path / "spools", [2, 3], [[0], [1]]), np.array([0, 1]))
    np.save(tmp_path / "a" / "loss_mask.npy", np.zeros(4, dtype=np.uint8))
    with pytest.raises(ValueError, match="don't belong together"):
        PackedSplit(tmp_path / "a")
    np.save(tmp_path / "a" / "loss_mask.npy", np.zeros(5, dtype=np.int64))
    with pytest.raises(ValueError, match="uint8"):
        PackedSplit(tmp_path / "a")


def test_megatron_packs(tmp_path: Path) -> None:
    write_megatron(tmp_path / "training.npy", filled(tmp_path / "spools", [2, 1, 3], [[0, 1], [2]]), np.array([1, 0]))
    packs = np.load(tmp_path / "training.npy", allow_pickle=True)
    assert packs.tolist() == [
        {"input_ids": [2, 2, 2], "loss_mask": [0, 1, 0], "seq_start_id": [0]},
        {"input_ids": [0, 0, 1], "loss_mask": [0, 0, 0], "seq_start_id": [0, 2]},
    ]
    assert packs.dtype == object
    assert packs.shape == (2,)
    # Megatron-Bridge appends to these as lists.
    assert all(type(column) is list for column in packs[0].values())


def test_parquet_packs(tmp_path: Path) -> None:
    from pyarrow import parquet

    packs = filled(tmp_path / "spools", [2, 1, 3], [[0, 1], [2]])
    facts = write_parquet(tmp_path / "packed.parquet", packs, np.array([1, 0]))
    assert (facts.tokens, facts.learned_tokens) == (6, 1)
    table = parquet.read_table(tmp_path / "packed.parquet")
    assert {field.name: str(field.type.value_type) for field in table.schema} == {
        "input_ids": "int32",
        "loss_mask": "uint8",
        "seq_start_id": "int32",
    }
    assert table.to_pylist() == [
        {"input_ids": [2, 2, 2], "loss_mask": [0, 1, 0], "seq_start_id": [0]},
        {"input_ids": [0, 0, 1], "loss_mask": [0, 0, 0], "seq_start_id": [0, 2]},
    ]
