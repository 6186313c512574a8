"""The tiny tokenizer and tasks: lossless text, short sequences, disjoint splits, the same bytes every time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_recipes.errors import UserError
from nemotron_recipes.fsio import tree_digest
from nemotron_recipes.tiny import tasks
from nemotron_recipes.tiny.tokenizer import MARKER_TOKENS, SPECIAL_TOKENS, WORDS, vocabulary_size, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < vocabulary_size() for i in ids)


@pytest.mark.parametrize("word", [*SPECIAL_TOKENS, *MARKER_TOKENS, *WORDS, *"0123456789"])
def test_one_token_each(tokenizer, word):
    assert len(tokenizer.encode(word).ids) == 1


def test_digits_never_merge(tokenizer):
    assert tokenizer.encode("1234").tokens == list("1234")


def test_the_same_bytes_every_time(tmp_path):
    write_tokenizer(tmp_path / "a")
    write_tokenizer(tmp_path / "b")
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")


def test_splits_share_no_problem():
    problems = {
        split: {
            frozenset(row["prompt"].removeprefix("Largest of ").rstrip("?").split())
            for seed in (0, 1)
            for row in tasks.rows("largest_of_three", "rl", split, 2000, seed)
        }
        for split in tasks.SPLITS
    }
    assert not problems["train"] & problems["test"]
    assert not problems["train"] & problems["validation"]
    assert not problems["validation"] & problems["test"]


def test_rows_are_unique_and_repeatable():
    once = [row["prompt"] for row in tasks.rows("largest_of_three", "rl", "train", 5000, 0)]
    assert len(set(once)) == 5000
    assert once == [row["prompt"] for row in tasks.rows("largest_of_three", "dpo", "train", 5000, 0)]
    assert once != [row["prompt"] for row in tasks.rows("largest_of_three", "rl", "train", 5000, 1)]


def test_forms():
    for row in tasks.rows("largest_of_three", "dpo", "test", 50, 0):
        numbers = [int(n) for n in row["prompt"].removeprefix("Largest of ").rstrip("?").split()]
        assert int(row["chosen"]) == max(numbers)
        assert row["rejected"] != row["chosen"] and len(row["rejected"]) == 2
    labels = [row["label"] for row in tasks.rows("largest_of_three", "kto", "train", 10, 0)]
    assert labels.count(True) == labels.count(False) == 5


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(("largest_of_thre", "sft", "test"), "largest_of_three"), (("largest_of_three", "grpo", "test"), "rl")],
)
def test_unknown_names_are_user_errors(arguments, hint):
    with pytest.raises(UserError, match=hint):
        list(tasks.rows(*arguments, 1, 0))
