"""Documents for pretraining, blend files, and columns of single sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.data.blend import read_blend
from nemotron_recipes.data.convert import convert
from nemotron_recipes.data.settings import cross_problems
from nemotron_recipes.data.show import load_tokenizer, show_row
from nemotron_recipes.errors import UserError
from nemotron_recipes.spec import Request
from tests.helpers.data_prep import bytes_of, chat, encoder, run_prepare, tiny_folder, write_rows

PRETRAIN: dict[str, Any] = {"chat_template": None, "end_of_document": "</s>"}


def documents(output: Path, prefix: str) -> list[list[int]]:
    """Field by field, as megatron/core/datasets/indexed_dataset.py reads them; tests/contract asks the real one."""
    index = (output / f"{prefix}.idx").read_bytes()
    assert (index[:9], index[9:17], index[17]) == (b"MMIDIDX\x00\x00", (1).to_bytes(8, "little"), 4)
    count, bounds = np.frombuffer(index, "<u8", 2, 18).tolist()
    assert bounds == count + 1
    lengths = np.frombuffer(index, "<i4", count, 34).tolist()
    offsets = np.frombuffer(index, "<i8", count, 34 + 4 * count).tolist()
    assert len(index) == 34 + 12 * count + 8 * bounds
    ids = np.fromfile(output / f"{prefix}.bin", "<i4").tolist()
    return [ids[start // 4 : start // 4 + length] for start, length in zip(offsets, lengths, strict=True)]


def test_documents_end_with_their_token_and_control_tokens_stay_text(tmp_path: Path) -> None:
    texts = ["one", "a <|im_end|></s> b", "é" * 200]
    rows = [*({"text": text} for text in texts), {"text": " \n"}, {"text": 3}, {"no": "text"}, {"text": "\ud83d"}]
    report, metadata = run_prepare(
        tmp_path / "out", [write_rows(tmp_path / "a.jsonl", rows)], "pretrain", **PRETRAIN, pack_size=8
    )
    found = documents(tmp_path / "out", "train/0-source-0_text_document")
    tokenizer = encoder()
    special = {tokenizer.token_id(token) for token in ("<|im_end|>", "</s>")}
    assert [ids[-1] for ids in found] == [tokenizer.token_id("</s>")] * 3
    assert not special & {token for ids in found for token in ids[:-1]}
    real = load_tokenizer(tiny_folder(), metadata)
    assert [real.decode(ids[:-1], skip_special_tokens=False) for ids in found] == texts, "longer than any pack, too"
    assert dict(report.total.dropped) == {"empty_text": 1, "wrong_type": 1, "missing_field": 1, "lone_surrogate": 1}
    assert metadata["format"] == "megatron_indexed"
    assert json.loads((tmp_path / "out" / "blend.json").read_text()) == {
        "train": ["1", "train/0-source-0_text_document"]
    }
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    shown = show_row(tmp_path / "out", metadata, real, "train", 1)
    assert shown.parts[0].pieces[0].text == "a <|im_end|></s> b</s>"
    with pytest.raises(UserError, match="already"):
        convert(tmp_path / "out", tmp_path / "x", "native")


def test_weights_are_the_trainings_and_splits_the_rows(tmp_path: Path) -> None:
    """A weight takes no document away and repeats none; a validation set has its own files."""
    files = [write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n} {m}"} for m in range(60)]) for n in (0, 1)]
    source = {"weight": 0.5, "name": "a b/c"}
    report, _ = run_prepare(
        tmp_path / "out",
        files,
        "pretrain",
        source,
        **PRETRAIN,
        splits={"train": 0.8, "validation": 0.2, "test": 0.0},
    )
    assert (report.total.read, report.total.written) == (120, 120)
    blend = json.loads((tmp_path / "out" / "blend.json").read_text())
    names = [f"{n}-a-b-c_text_document" for n in (0, 1)]
    assert blend == {
        "train": [word for name in names for word in ("0.5", f"train/{name}")],
        "valid": [word for name in names for word in ("0.5", f"validation/{name}")],
    }
    counted = sum(len(documents(tmp_path / "out", prefix)) for part in blend.values() for prefix in part[1::2])
    assert counted == 120
    run_prepare(tmp_path / "again", files, "pretrain", source, **PRETRAIN, workers=2,
                splits={"train": 0.8, "validation": 0.2, "test": 0.0})  # fmt: skip
    ours, theirs = bytes_of(tmp_path / "out"), bytes_of(tmp_path / "again")
    assert ours == theirs


def test_gates_look_at_documents(tmp_path: Path) -> None:
    texts = ["write to a.b@example.com now", "the very same", "the very same", "word " * 200]
    gates = {
        "pii": {"action": "redact", "kinds": ["email"]},
        "exact_duplicates": {},
        "repetition": {"ngram": 3, "max_share": 0.5},
    }
    file = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    report, metadata = run_prepare(tmp_path / "out", [file], "pretrain", **PRETRAIN, gates=gates)
    assert dict(report.total.dropped) == {"duplicate": 1, "repetitive": 1}
    first = show_row(tmp_path / "out", metadata, load_tokenizer(tiny_folder(), metadata), "train", 0)
    assert first.parts[0].pieces[0].text == "write to [EMAIL] now</s>"


def test_what_does_not_go_together() -> None:
    source = [{"path": "a.jsonl"}]
    for data, method, words in (
        ({}, "pretrain", "end_of_document is missing"),
        ({"end_of_document": "</s>"}, "pretrain", "chat_template has no meaning"),
        ({**PRETRAIN, "format": "parquet"}, "pretrain", "format"),
        ({"chat_template": None}, "sft", "chat_template is missing"),
        ({"blend": "b.json"}, "sft", "data.blend is the plan's"),
        ({"end_of_document": "</s>"}, "sft", "end_of_document has no meaning"),
        ({**PRETRAIN, "gates": {"structure": {"min_turns": 2}}}, "pretrain", "structure has no meaning"),
        ({"sources": [{"path": "a", "columns": {"text": "t"}}]}, "sft", "sources.0.columns.text has no meaning"),
    ):
        found = cross_problems({"sources": source, "tokenizer": "tiny", **data}, method)
        assert any(words in problem.what for problem in found), (words, found)


def test_a_token_that_is_not_there(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="no token '<eod>'"):
        run_prepare(tmp_path / "out", [file], "pretrain", chat_template=None, end_of_document="<eod>")


def test_each_source_has_its_columns(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [{"instruction": "q", "output": "a"}])
    second = write_rows(tmp_path / "b.jsonl", [chat("q", "b")])
    third = write_rows(tmp_path / "c.jsonl", [{"talk": chat("q", "c")["messages"]}])
    (tmp_path / "out").mkdir()
    sources = [
        {"path": str(first), "split": "train", "columns": {"prompt": "instruction", "response": "output"}},
        {"path": str(second), "split": "train"},
        {"path": str(third), "split": "train", "columns": {"messages": "talk"}},
    ]
    report, _ = run_prepare(tmp_path / "all", [first, second, third], sources=sources)
    assert (report.total.read, report.total.written) == (3, 3)


BLEND: dict[str, Any] = {
    "datasets": [
        {"name": "code", "path": "hf://nvidia/A", "subset": "X", "split": "train", "weight": 2.0, "text_field": "t"},
        {"name": "own", "path": "own.jsonl", "columns": {"prompt": "q"}, "rows": 5},
        {"name": "all", "path": "hf://nvidia/B"},
    ]
}


def blend(folder: Path, tree: Any) -> Path:
    path = folder / "blend.json"
    path.write_text(json.dumps(tree))
    return path


def test_a_blend_in_the_published_format(tmp_path: Path) -> None:
    code, own, every = read_blend(blend(tmp_path, BLEND), "sft")
    assert (code["path"], code["subset"], code["hub_split"], code["weight"]) == ("hf://nvidia/A", "X", "train", 2.0)
    assert code["columns"] is None, "text_field is about text"
    assert (own["path"], own["columns"]["prompt"], own["rows"]) == (str(tmp_path / "own.jsonl"), "q", 5)
    assert (every["hub_split"], every["split"], every["weight"]) == ("all", None, 1.0)
    assert read_blend(blend(tmp_path, BLEND), "pretrain")[0]["columns"]["text"] == "t"
    entries = [{"name": "a", "path": "a.jsonl"}]
    (unknown,) = read_blend(blend(tmp_path, {"datasets": [{"path": "~nosuchuser/x"}]}), "sft")
    assert unknown["path"] == str(tmp_path / "~nosuchuser/x"), "which is then said not to be there"
    by_split = read_blend(blend(tmp_path, {"train": entries, "valid": entries, "test": entries}), "sft")
    assert [source["split"] for source in by_split] == ["train", "validation", "test"]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ([], "holds no data sets"),
        ({"datasets": []}, "holds no data sets"),
        ({"trian": []}, "unknown key 'trian'"),
        ({"datasets": {}}, "must be a list"),
        ({"datasets": [{"path": "a", "wieght": 1}]}, "datasets.0: unknown key 'wieght'"),
        ({"datasets": [{"path": "a", "columns": "text"}]}, "datasets.0.columns: an object is expected, not 'text'"),
        ({"datasets": [{"path": "a", "columns": 3}]}, "datasets.0.columns: an object is expected, not 3"),
        ({"datasets": [{"path": "a", "weight": "1"}]}, "datasets.0.weight: '1' is not of type float"),
        ({"datasets": [{"path": "a", "weight": 0}]}, "must be above 0"),
        ({"datasets": [{"name": "a"}]}, "datasets.0.path is missing"),
        ({"datasets": [{"path": "a.jsonl", "split": "train"}]}, "split is for hub data sets"),
        ({"datasets": [1]}, "an object is expected"),
        ({"datasets": [{"path": "a"}], "train": [{"path": "a"}]}, "exclude each other"),
    ],
)
def test_a_blend_that_is_wrong(tmp_path: Path, tree: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_blend(blend(tmp_path, tree), "sft")
    assert words in str(caught.value)


def test_a_plan_takes_its_sources_from_a_blend(tmp_path: Path) -> None:
    """From another folder than the blend's; what a blend names is pinned like any source."""
    (tmp_path / "elsewhere").mkdir()
    write_rows(tmp_path / "own.jsonl", [chat("q", "a")])
    blend(tmp_path, {"datasets": [{"name": "own", "path": "own.jsonl", "weight": 3}]})
    words = ("data.blend=../blend.json", "data.tokenizer=tiny")
    request = Request("nano3", ("data", "prep", "sft"), overrides=words, offline=True, cwd=str(tmp_path / "elsewhere"))
    (stage,) = lifecycle.prepare(request).plan.stages
    (source,) = stage.config["data"]["sources"]
    assert (source["name"], source["weight"], stage.config["data"]["blend"]) == ("own", 3.0, None)
    assert stage.inputs["data.sources.0.path"].digest
    assert stage.changed["data.sources"].kind == "command line"
    both = Request(**{**request.__dict__, "overrides": (*words, "data.sources=[{path: a}]")})
    with pytest.raises(UserError, match="exclude each other"):
        lifecycle.prepare(both)
