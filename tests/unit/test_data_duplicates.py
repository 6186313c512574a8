"""Duplicates, against what comparing every pair would find."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_recipes.data.gate_settings import ExactDuplicates, GateSettings, NearDuplicates
from nemotron_recipes.data.gates import Block, Candidate, spill
from nemotron_recipes.data.gates.build import build_gates
from nemotron_recipes.data.gates.duplicates import ExactGate, NearGate
from nemotron_recipes.data.settings import SPLITS
from tests.helpers.data_prep import chat, read_row

RANDOM = np.random.Generator(np.random.PCG64(1))
STATE = RANDOM.bit_generator.state


@pytest.fixture(autouse=True)
def the_same_numbers_in_every_test() -> None:
    RANDOM.bit_generator.state = STATE


@dataclass(frozen=True)
class Signatures:
    """A corpus in memory, in blocks of two rows."""

    signatures: list[bytes]
    splits: list[str]
    alive: list[bool]

    @property
    def rows(self) -> int:
        return len(self.signatures)

    def blocks(self) -> Iterator[Block]:
        for at in range(0, self.rows, 2):
            here = slice(at, at + 2)
            raw = np.stack([np.frombuffer(one, dtype=np.uint8) for one in self.signatures[here]])
            splits = np.array([SPLITS.index(split) for split in self.splits[here]], dtype=np.uint8)
            yield Block(raw, splits, np.array(self.alive[here]))

    def describe(self, index: int) -> str:
        return f"row {index}"


def swept(gate: Any, folder: Path, signatures: list[bytes], splits: list[str], alive: list[bool] | None = None) -> Any:
    corpus = Signatures(signatures, splits, alive or [True] * len(signatures))
    folder.mkdir()
    found = list(gate.sweep(corpus, folder))
    assert [one.index for one in found] == sorted(one.index for one in found)
    return found


def exact(row: dict[str, Any], method: str = "sft", by: Any = "row") -> bytes:
    return ExactGate(ExactDuplicates(by)).signature(Candidate(read_row(row, method), row, "train"), [])


def test_what_makes_rows_equal() -> None:
    row = chat("a", "b")
    assert exact(row) == exact({**row, "id": 7})  # fields beside the conversation don't count
    assert exact(row) != exact(chat("a", "c"))
    assert exact(row, by="prompt") == exact(chat("a", "c"), by="prompt")
    assert exact(row) != exact({**row, "tools": [{"name": "f"}]})
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert exact(pair, "dpo") != exact({**pair, "rejected": "d"}, "dpo")
    assert exact(pair, "dpo", "prompt") == exact({**pair, "rejected": "d"}, "dpo", "prompt")
    assert len(exact(row)) == ExactGate.width


@pytest.mark.parametrize("part_bytes", [1 << 26, 64])  # one part; many parts
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(SPLITS), st.integers(0, 4)), max_size=14))
def test_exact_duplicates(part_bytes: int, rows: list[Any], tmp_path_factory: Any) -> None:
    """The first training row of equal ones stays, or, without any, the first one."""
    expected = {}
    alive = [(row, value, split) for row, (value, split, dead) in enumerate(rows) if dead]
    for row, value, split in alive:
        group = [(other_split != "train", other) for other, other_value, other_split in alive if other_value == value]
        held_out, first = min(group)
        if row != first:
            expected[row] = "duplicate" if split == "train" or held_out else "in_training"
    folder = tmp_path_factory.mktemp("exact") / "scratch"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "PART_BYTES", part_bytes)
        signatures = [bytes([value]) * 16 for value, _, _ in rows]
        found = swept(
            ExactGate(ExactDuplicates()), folder, signatures, [s for _, s, _ in rows], [d > 0 for _, _, d in rows]
        )
    assert {one.index: one.reason for one in found} == expected


def test_the_first_examples_name_both_rows(tmp_path: Path) -> None:
    found = swept(ExactGate(ExactDuplicates()), tmp_path / "s", [b"x" * 16] * 9, ["train"] * 9)
    assert [one.example for one in found] == [f"row {n}: like row 0" for n in range(1, 6)] + [""] * 3


def near(**values: Any) -> NearGate:
    return NearGate(NearDuplicates(**values))


def sign(gate: NearGate, tokens: np.ndarray) -> bytes:
    return gate.signature(Candidate(read_row(chat("a", "b")), {}, "train"), [tokens.astype(np.int32)])


def edited(tokens: np.ndarray, share: float) -> np.ndarray:
    """The same with this share of tokens replaced."""
    tokens = tokens.copy()
    places = RANDOM.choice(len(tokens), int(share * len(tokens)), replace=False)
    tokens[places] = RANDOM.integers(10_000, 20_000, len(places))
    return tokens


def ngrams(tokens: np.ndarray, size: int = 5) -> set[tuple[int, ...]]:
    return {tuple(tokens[at : at + size].tolist()) for at in range(len(tokens) - size + 1)}


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    a, b = ngrams(one), ngrams(other)
    return len(a & b) / len(a | b)


def test_the_estimate_is_the_jaccard_similarity() -> None:
    """Equal minima estimate it with a standard error of sqrt(J (1 - J) / permutations)."""
    gate = near(permutations=1024)
    for share in (0.0, 0.01, 0.05, 0.2):
        one = RANDOM.integers(0, 5000, 400)
        other = edited(one, share)
        a, b = (np.frombuffer(sign(gate, tokens), dtype="<u4")[:-1] for tokens in (one, other))
        true = jaccard(one, other)
        assert abs((a == b).mean() - true) <= 5 * (true * (1 - true) / 1024) ** 0.5 + 1e-9


@pytest.mark.parametrize("part_bytes", [1 << 26, 1 << 12])
def test_near_duplicates(part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row that goes is like one that was there, and nearly all pairs above the threshold are found."""
    monkeypatch.setattr(spill, "PART_BYTES", part_bytes)
    originals = [RANDOM.integers(0, 5000, int(RANDOM.integers(120, 300))) for _ in range(150)]
    rows = [*originals, *(edited(one, 0.01) for one in originals[:100]), *(edited(one, 0.3) for one in originals[:50])]
    found = swept(near(), tmp_path / "s", [sign(near(), row) for row in rows], ["train"] * len(rows))
    gone = {one.index for one in found}
    assert gone <= set(range(150, 250))  # the first of each pair stays; 30 % edits are another text
    sure = {150 + n for n in range(100) if jaccard(rows[n], rows[150 + n]) >= 0.9}
    assert len(sure) > 50
    assert len(sure - gone) <= 1
    assert all(one.reason == "near_duplicate" for one in found)
    assert not list((tmp_path / "s").glob("*/*"))  # what was spilled is gone


def test_rows_far_below_the_threshold_stay(tmp_path: Path) -> None:
    rows = [RANDOM.integers(0, 5000, 100) for _ in range(300)]
    assert swept(near(), tmp_path / "s", [sign(near(), row) for row in rows], ["train"] * 300) == []


def test_held_out_rows_near_training_rows_go(tmp_path: Path) -> None:
    """Whatever the order, and also where that training row itself is a near-duplicate of another."""
    text = RANDOM.integers(0, 5000, 400)
    again = edited(text, 0.01)
    other = RANDOM.integers(0, 5000, 400)
    rows = [text, again, text, other, other, RANDOM.integers(0, 5000, 400)]
    splits = ["validation", "train", "train", "test", "validation", "test"]
    found = swept(near(), tmp_path / "s", [sign(near(), row) for row in rows], splits)
    assert [(one.index, one.reason) for one in found] == [
        (0, "near_training"), (2, "near_duplicate"), (4, "near_duplicate")
    ]  # fmt: skip


def test_which_one_stays(tmp_path: Path) -> None:
    text = RANDOM.integers(0, 5000, 400)
    rows = [text, np.append(text, [1, 2, 3, 4, 5])]
    for keep, gone in (("first", 1), ("longest", 0)):
        gate = near(keep=keep)
        found = swept(gate, tmp_path / keep, [sign(gate, row) for row in rows], ["train"] * 2)
        assert [one.index for one in found] == [gone]


def test_a_stranger_in_the_only_common_band_hides_no_pair(tmp_path: Path) -> None:
    gate = near()
    deep = gate.rows_per_band
    stranger, one = (RANDOM.integers(0, 2**32, 129, dtype=np.uint32) for _ in range(2))
    stranger[:deep] = one[:deep]
    other = one.copy()
    other[deep:128:deep] += 1  # one number of every other band
    assert (one[:128] == other[:128]).mean() >= 0.8
    found = swept(gate, tmp_path / "s", [row.tobytes() for row in (stranger, one, other)], ["train"] * 3)
    assert [(row.index, row.example) for row in found] == [(2, "row 2: like row 1")]


def test_rows_that_earlier_gates_dropped_do_not_count(tmp_path: Path) -> None:
    signature = sign(near(), RANDOM.integers(0, 5000, 400))
    found = swept(near(), tmp_path / "s", [signature] * 3, ["train"] * 3, [False, True, True])
    assert [(one.index, one.example) for one in found] == [(2, "row 2: like row 1")]


def test_short_and_empty_rows(tmp_path: Path) -> None:
    rows = [np.array([], int), np.array([1]), np.array([1, 2]), np.array([1, 2]), np.array([2, 1])]
    found = swept(near(), tmp_path / "s", [sign(near(), row) for row in rows], ["train"] * 5)
    assert [one.index for one in found] == [3]
    assert list(near().sweep(Signatures([], [], []), tmp_path)) == []


def test_words_look_past_a_shared_system_prompt() -> None:
    system = {"role": "system", "content": "You are a helpful assistant. " * 50}
    rows = [
        {"messages": [system, *chat(f"Question {n}: why?", f"Because of {n} things.")["messages"]]} for n in range(2)
    ]
    gate = near(of="words", ngram=3)
    one, other = (
        np.frombuffer(gate.signature(Candidate(read_row(row), row, "train"), []), dtype="<u4")[:-1] for row in rows
    )
    assert (one == other).mean() < 0.5


def test_signatures_do_not_follow_from_threshold_and_keep() -> None:
    assert near(threshold=0.9, keep="longest").key == near().key
    assert near(ngram=7).key != near().key
    for one, other in combinations((near(of="words"), near(permutations=256), near()), 2):
        assert one.key != other.key


def test_equal_rows_are_looked_for_before_similar_ones() -> None:
    gates = build_gates(GateSettings(near_duplicates=NearDuplicates(), exact_duplicates=ExactDuplicates()))
    assert [gate.name for gate in gates.corpus] == ["exact_duplicates", "near_duplicates"]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    gate = near(threshold=threshold)
    deep = gate.rows_per_band
    assert 1 - (1 - threshold**deep) ** (128 // deep) >= 0.98
