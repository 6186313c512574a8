"""Converted data say the same as what they were converted from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron_recipes.data.convert import convert
from nemotron_recipes.data.packed import PackedSplit
from nemotron_recipes.errors import UserError
from tests.helpers.cli import nemotron
from tests.helpers.data_prep import bytes_of, chat, rows_of, run_prepare, write_rows


def prepared(tmp_path: Path, **data: Any) -> Path:
    rows = [chat(f"What is {n}?", "It is " + "so " * (n % 17) + f"{n}.") for n in range(200)]
    output = tmp_path / "-".join(["prepared", *map(str, data.values())])
    file = write_rows(tmp_path / "rows.jsonl", rows)
    run_prepare(output, [file], source={"split": None}, splits={"train": 0.8, "validation": 0.1, "test": 0.1}, **data)
    return output


def sequences(folder: Path) -> list[list[int]]:
    found = []
    for one in PackedSplit(folder / "train"):
        found += [part.tolist() for part in np.split(one["input_ids"], one["seq_start_id"][1:])]
    return sorted(found)


@pytest.mark.parametrize("layout", ["parquet", "megatron_npy"])
def test_converted_is_as_prepared_so(tmp_path: Path, layout: str) -> None:
    convert(prepared(tmp_path), tmp_path / "converted", layout)
    ours, direct = bytes_of(tmp_path / "converted"), bytes_of(prepared(tmp_path, format=layout))
    assert ours.pop("metadata.json") != direct.pop("metadata.json")
    assert "data-card.md" in ours
    assert ours == direct


def test_another_pack_size(tmp_path: Path) -> None:
    source = prepared(tmp_path)
    metadata = convert(source, tmp_path / "larger", "native", pack_size=512)
    split = PackedSplit(tmp_path / "larger" / "train")
    card = json.loads((tmp_path / "larger" / "data-card.json").read_text())
    assert (card["pack_size"], card["splits"]["train"]["packs"]) == (512, len(split))
    assert metadata["splits"]["train"]["packs"] == len(split) < len(PackedSplit(source / "train"))
    assert all(len(one["input_ids"]) <= 512 for one in split)
    assert sequences(tmp_path / "larger") == sequences(source)
    assert split.loss_mask.sum() == PackedSplit(source / "train").loss_mask.sum()
    assert rows_of(tmp_path / "larger", "test") == rows_of(source, "test")
    with pytest.raises(UserError, match="doesn't fit into packs of 32"):
        convert(source, tmp_path / "smaller", "native", pack_size=32)
    assert not list(tmp_path.glob("*smaller*"))


def test_megatron_indexed(tmp_path: Path) -> None:
    """The layout of megatron-core's indexed dataset, read field by field."""
    source = prepared(tmp_path)
    convert(source, tmp_path / "out", "megatron_indexed")
    index = (tmp_path / "out" / "train" / "text_document.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert int.from_bytes(index[9:17], "little") == 1
    assert index[17] == 4
    count, documents = np.frombuffer(index, "<u8", 2, 18).tolist()
    assert documents == count + 1
    lengths = np.frombuffer(index, "<i4", count, 34)
    offsets = np.frombuffer(index, "<i8", count, 34 + 4 * count)
    bounds = np.frombuffer(index, "<i8", documents, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * documents
    assert bounds.tolist() == list(range(documents))
    ids = np.fromfile(tmp_path / "out" / "train" / "text_document.bin", "<i4")
    found = [ids[o // 4 : o // 4 + n].tolist() for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True)]
    assert sorted(found) == sequences(source)


ASKED = [{"role": "user", "content": "a"}]
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]] = {
    "dpo": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {
            "prompt": ASKED,
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
        {
            "context": ASKED,
            "completions": [
                {"rank": 0, "completion": [{"role": "assistant", "content": "b"}]},
                {"rank": 1, "completion": [{"role": "assistant", "content": "c"}]},
            ],
        },
    ),
    "kto": (
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": ASKED, "completion": [{"role": "assistant", "content": "b"}], "label": True},
        None,
    ),
    "rl": (
        {"prompt": "a", "expected_answer": "7", "level": "hard"},
        {"prompt": ASKED, "expected_answer": "7", "level": "hard"},
        {"input": "a", "output": "7"},
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_rows_for_other_trainers(tmp_path: Path, method: str) -> None:
    row, trl, nemo_rl = METHODS[method]
    run_prepare(tmp_path / "rows", [write_rows(tmp_path / "rows.jsonl", [row])], method)
    convert(tmp_path / "rows", tmp_path / "trl", "trl")
    assert [json.loads(line) for line in (tmp_path / "trl" / "train.jsonl").open()] == [trl]
    assert (tmp_path / "trl" / "test.jsonl").read_text() == ""
    if nemo_rl is None:
        with pytest.raises(UserError, match="NeMo-RL reads no KTO rows"):
            convert(tmp_path / "rows", tmp_path / "nemo", "nemo_rl")
        return
    convert(tmp_path / "rows", tmp_path / "nemo", "nemo_rl")
    assert [json.loads(line) for line in (tmp_path / "nemo" / "train.jsonl").open()] == [nemo_rl]


def test_the_command(tmp_path: Path) -> None:
    source = prepared(tmp_path)
    target = tmp_path / "out put"
    assert "parquet" in nemotron(tmp_path, "data", "convert", str(source), str(target), "--to", "parquet")
    nemotron(tmp_path, "data", "convert", str(source), str(target), "--to", "parquet", code=2)
    for words, message in (
        ((source, target, "parquet"), "is there already"),
        ((source, tmp_path / "new", "parkuet"), "did you mean 'parquet'"),
        ((target, tmp_path / "new", "native"), "is for other tools to read"),
        ((tmp_path, tmp_path / "new", "native"), "nothing that data prep made"),
    ):
        with pytest.raises(UserError, match=message):
            convert(*words)
    assert not (tmp_path / "new").exists()
