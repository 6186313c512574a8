"""Packs are taken apart without a token lost, and the order of the data follows from the seed alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_recipes.errors import UserError
from nemotron_recipes.worker.trl.config import read_config
from nemotron_recipes.worker.trl.data import DataFolder
from nemotron_recipes.worker.trl.order import shuffled_epochs
from nemotron_recipes.worker.trl.packed import IGNORED, conversations
from nemotron_recipes.worker.trl.trainers import Numbered, with_mismatched


def test_conversations_of_a_pack():
    pack = {
        "input_ids": np.array([1, 2, 3, 4, 5, 6, 7], dtype=np.int32),
        # aligned to labels: 2 -> 3 and 3 -> 4 are trained in the first, 6 -> 7 in the second
        "loss_mask": np.array([0, 1, 1, 0, 0, 1, 0], dtype=np.uint8),
        "seq_start_id": np.array([0, 4], dtype=np.int32),
    }
    first, second = conversations(pack)
    assert first[0].tolist() == [1, 2, 3, 4] and first[1].tolist() == [IGNORED, IGNORED, 3, 4]
    assert second[0].tolist() == [5, 6, 7] and second[1].tolist() == [IGNORED, IGNORED, 7]


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 500), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5)
)
def test_every_trained_token_stays_trained_and_no_other(parts):
    ids, mask, starts = [], [], []
    for part in parts:
        starts.append(len(ids))
        ids += [token for token, _ in part]
        mask += [int(wanted) for _, wanted in part[:-1]] + [0]
    pack = {"input_ids": ids, "loss_mask": mask, "seq_start_id": starts}
    found = list(conversations(pack))
    assert [token for tokens, _ in found for token in tokens] == ids
    assert sum(int((labels != IGNORED).sum()) for _, labels in found) == sum(mask)
    for (tokens, labels), part in zip(found, parts, strict=True):
        for position in range(1, len(tokens)):
            assert (labels[position] == tokens[position]) == part[position - 1][1]
        assert labels[0] == IGNORED


@given(st.integers(1, 50), st.integers(0, 200), st.integers(0, 5))
def test_each_epoch_uses_each_row_once(rows, total, seed):
    order = shuffled_epochs(rows, total, seed)
    assert len(order) == total
    for start in range(0, total, rows):
        epoch = order[start : start + rows]
        assert len(set(epoch)) == len(epoch)
    assert order == shuffled_epochs(rows, total + 7, seed)[:total]


def test_seeds_and_epochs_differ():
    assert shuffled_epochs(100, 100, 0) != shuffled_epochs(100, 100, 1)
    assert shuffled_epochs(100, 200, 0)[:100] != shuffled_epochs(100, 200, 0)[100:]


def test_numbering_over_splits():
    rows = Numbered(["a", "b"], ["c"])
    assert [rows[i] for i in range(3)] == ["a", "b", "c"]
    with pytest.raises(IndexError):
        rows[3]


def test_mismatched_pairs_are_the_same_completions():
    batch = [{"completion_ids": [i]} for i in range(4)]
    shifted = [example["KL_completion_ids"] for example in with_mismatched(batch)]
    assert sorted(shifted) == [[0], [1], [2], [3]]
    assert all(example["KL_completion_ids"] != example["completion_ids"] for example in with_mismatched(batch))


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "grpo"])
def test_the_longest_row_of_no_rows_is_a_message(tmp_path, method):
    empty = object.__new__(DataFolder)
    empty.folder = tmp_path
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "rows.jsonl").touch()
    with pytest.raises(UserError, match="holds nothing to train on"):
        empty.longest(read_config({"method": method, "trainer": {}, "rewards": ["exact_match"]}))
