"""Converted data say the same as what they were converted from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron_recipes.data.convert import convert
from nemotron_recipes.data.layouts import write_rows as write_layout
from nemotron_recipes.data.packed import PackedSplit
from nemotron_recipes.data.packs_in import packs_of_npy
from nemotron_recipes.data.show import show_row
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


def converted(source: Path, target: Path, layout: str, pack_size: int | None = None) -> dict[str, bytes]:
    """The bytes of a conversion, without the record of what was made of what."""
    convert(source, target, layout, pack_size)
    found = bytes_of(target)
    found.pop("metadata.json")
    return found


def test_packs_come_back_from_every_layout(tmp_path: Path) -> None:
    """From native to each and back, from one to the other, and to another pack size: the same bytes."""
    direct = {layout: prepared(tmp_path, format=layout) for layout in ("native", "parquet", "megatron_npy")}
    expected = {layout: {n: c for n, c in bytes_of(f).items() if n != "metadata.json"} for layout, f in direct.items()}
    for layout, other in (("parquet", "megatron_npy"), ("megatron_npy", "parquet")):
        assert converted(direct[layout], tmp_path / f"{layout}-back", "native") == expected["native"]
        assert converted(direct[layout], tmp_path / f"{layout}-over", other) == expected[other]
        larger = converted(direct[layout], tmp_path / f"{layout}-larger", "native", 512)
        assert larger == converted(direct["native"], tmp_path / f"native-larger-{layout}", "native", 512)
    assert not list(tmp_path.glob(".*"))


class Evil:
    """A pickle of it creates a file when it is loaded as pickles are."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_an_npy_is_read_as_data_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What numpy's own pickler writes is understood; what a file wants to call is not called; a cut one is an error."""
    monkeypatch.chdir(tmp_path)
    source = prepared(tmp_path, format="megatron_npy")
    packs = np.load(source / "training.npy", allow_pickle=True)
    np.save(tmp_path / "as-numpy.npy", packs, allow_pickle=True)
    for pack, (ids, mask, starts) in zip(packs, packs_of_npy(tmp_path / "as-numpy.npy"), strict=True):
        assert {"input_ids": ids.tolist(), "loss_mask": mask.tolist(), "seq_start_id": starts.tolist()} == pack
    good = (source / "training.npy").read_bytes()
    np.save(tmp_path / "evil.npy", np.array([{"input_ids": Evil()}], dtype=object), allow_pickle=True)
    for bad in (good[: len(good) // 2], (tmp_path / "evil.npy").read_bytes(), b"no array", good[:-9] + b"garbage.."):
        (source / "training.npy").write_bytes(bad)
        with pytest.raises(UserError, match="is not as data prep wrote it"):
            convert(source, tmp_path / "out", "native")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_damaged_files_are_said_plainly(tmp_path: Path) -> None:
    npy = tmp_path / "npy"
    convert(prepared(tmp_path), npy, "megatron_npy")
    (npy / "training.npy").write_bytes((npy / "training.npy").read_bytes()[:-40])
    metadata = json.loads((npy / "metadata.json").read_text())
    with pytest.raises(UserError, match="is not as data prep wrote it"):
        show_row(npy, metadata, None, "train", metadata["splits"]["train"]["sequences"] - 1)
    rows = tmp_path / "rows.jsonl"
    for damaged in ('{"prompt":', '{"prompt": []}', "7"):
        rows.write_text(damaged + "\n")
        with pytest.raises(UserError, match="the row is not as data prep wrote it") as caught:
            write_layout(rows, tmp_path / "out.jsonl", "dpo", "trl")
        assert "rows.jsonl, line 1" in str(caught.value)
    with pytest.raises(UserError, match="is not there"):
        write_layout(tmp_path / "none.jsonl", tmp_path / "out.jsonl", "dpo", "trl")


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
    ours = converted(tmp_path / "rows", tmp_path / "nemo", "nemo_rl")
    assert [json.loads(line) for line in (tmp_path / "nemo" / "train.jsonl").open()] == [nemo_rl]
    assert converted(tmp_path / "trl", tmp_path / "nemo-of-trl", "nemo_rl") == ours
    back = converted(tmp_path / "nemo", tmp_path / "trl-of-nemo", "trl")["train.jsonl"]
    trl.pop("level", None)  # has no place in NeMo-RL's layout
    assert json.loads(back) == trl


@pytest.mark.parametrize("method", ["dpo", "rl"])
def test_tools_have_no_place_in_nemo_rl(tmp_path: Path, method: str) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    run_prepare(tmp_path / "rows", [write_rows(tmp_path / "rows.jsonl", [{**METHODS[method][0], "tools": [tool]}])],
                method, pack_size=2048)  # fmt: skip
    with pytest.raises(UserError, match="no place for tools"):
        convert(tmp_path / "rows", tmp_path / "nemo", "nemo_rl")
    convert(tmp_path / "rows", tmp_path / "trl", "trl")
    assert json.loads((tmp_path / "trl" / "train.jsonl").read_text())["tools"] == [tool]
    with pytest.raises(UserError, match="holds no token ids"):
        convert(tmp_path / "trl", tmp_path / "native", "native")


def test_the_command(tmp_path: Path) -> None:
    source = prepared(tmp_path)
    target = tmp_path / "out put"
    assert "parquet" in nemotron(tmp_path, "data", "convert", str(source), str(target), "--to", "parquet")
    nemotron(tmp_path, "data", "convert", str(source), str(target), "--to", "parquet", code=2)
    convert(source, tmp_path / "indexed", "megatron_indexed")
    for words, message in (
        ((source, target, "parquet"), "is there already"),
        ((source, tmp_path / "new", "parkuet"), "did you mean 'parquet'"),
        ((source, tmp_path / "new", "trl"), "the messages are not in them"),
        ((tmp_path / "indexed", tmp_path / "new", "native"), "without loss masks"),
        ((tmp_path, tmp_path / "new", "native"), "nothing that data prep made"),
    ):
        with pytest.raises(UserError, match=message):
            convert(*words)
    assert not (tmp_path / "new").exists()
