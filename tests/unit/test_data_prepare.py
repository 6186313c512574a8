"""Preparation as a whole: every row accounted for, the same bytes every time, splits that stay put."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_recipes.data.job import Job
from nemotron_recipes.data.packed import PackedSplit
from nemotron_recipes.data.prepare import prepare
from nemotron_recipes.data.settings import read_settings
from nemotron_recipes.data.splits import copies, split_of, weight_point
from nemotron_recipes.errors import UserError
from tests.helpers.data_prep import TEMPLATE, bytes_of, chat, encoder, rows_of, run_prepare, tiny_folder, write_rows

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


def many(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [chat(f"What is {n}?", f"It is {n}.") for n in range(start, start + count)]


def decoded(split: PackedSplit) -> list[str]:
    """The text of every sequence, sorted."""
    texts = []
    for one in split:
        ends = [*one["seq_start_id"][1:].tolist(), len(one["input_ids"])]
        for start, end in zip(one["seq_start_id"].tolist(), ends, strict=True):
            texts.append(encoder()._tokenizer.decode(one["input_ids"][start:end], skip_special_tokens=False))
    return sorted(texts)


def test_every_row_is_somewhere_and_the_counts_balance(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [
        *many(5),
        chat("too long", "x" * 500),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        {"messages": "wrong"},
        {"messages": [
            {"role": "user", "content": "one"}, {"role": "assistant", "content": "1", "reasoning_content": "r"},
            {"role": "user", "content": "two"}, {"role": "assistant", "content": "2", "reasoning_content": "s"},
            {"role": "user", "content": "three"}, {"role": "assistant", "content": "3" * 200},
        ]},
    ])  # fmt: skip
    with rows.open("ab") as handle:
        handle.write(b"{broken\n\xff\xfe\n")
    report, metadata = run_prepare(tmp_path / "out", [rows])
    total = metadata["total"]
    assert total == {
        "rows_read": 11,
        "rows_written": 6,
        "rows_dropped": {"invalid_json": 1, "invalid_utf8": 1, "nothing_to_train": 1, "overlong": 1, "wrong_type": 1},
        "sequences_written": 7,
        "sequences_dropped": {"overlong": 1},
        "sequences_truncated": 0,
        "sequences_split": 0,
    }
    assert total["rows_read"] == total["rows_written"] + sum(total["rows_dropped"].values())
    split = PackedSplit(tmp_path / "out" / "train")
    assert len(decoded(split)) == 7
    assert metadata["splits"]["train"] == {
        "rows": 6, "sequences": 7, "packs": len(split), "tokens": len(split.input_ids),
        "learned_tokens": int(split.loss_mask.sum()), "longest": report.splits["train"].longest,
        "packing_efficiency": round(len(split.input_ids) / (len(split) * 128), 6),
    }  # fmt: skip
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(one["file"], one["line"], one["reason"]) for one in bad] == [
        ("rows.jsonl", 8, "wrong_type"),
        ("rows.jsonl", 10, "invalid_json"),
        ("rows.jsonl", 11, "invalid_utf8"),
    ]
    assert metadata["bad_rows"] == 3
    assert metadata["files"].keys() == bytes_of(tmp_path / "out").keys() - {"metadata.json"}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(
        st.one_of(
            st.sampled_from([{}, [], None, "x", chat("a", ""), chat("a", "b" * 300), {"messages": [{}]}]),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=9).map(lambda text: chat(text, "answer")),
        ),
        max_size=20,
    ),
    overlong=st.sampled_from(["drop", "truncate"]),
)
def test_counts_balance_whatever_comes(tmp_path_factory: Any, content: list[Any], overlong: str) -> None:
    tmp_path = tmp_path_factory.mktemp("balance")
    rows = write_rows(tmp_path / "rows.jsonl", [*content, chat("kept", "kept")])
    report, _ = run_prepare(tmp_path / "out", [rows], overlong=overlong)
    total = report.total
    assert total.read == len(content) + 1 == total.written + sum(total.dropped.values())
    split = PackedSplit(tmp_path / "out" / "train")
    assert len(split.seq_start_id) == total.sequences == total.written
    assert all(len(one["input_ids"]) <= 128 for one in split)


def test_masks_follow_their_sequences_into_packs(tmp_path: Path) -> None:
    run_prepare(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", many(30))])
    learned = []
    for one in PackedSplit(tmp_path / "out" / "train"):
        labels = np.roll(one["input_ids"], -1)
        assert not one["loss_mask"][one["seq_start_id"][1:] - 1].any()  # no label lies in the next conversation
        learned.append(encoder()._tokenizer.decode(labels[one["loss_mask"] == 1], skip_special_tokens=False))
    texts = [text + "<|im_end|>" for one in learned for text in one.removesuffix("<|im_end|>").split("<|im_end|>")]
    assert sorted(texts) == sorted(f"It is {n}.<|im_end|>" for n in range(30))


def test_truncation_keeps_what_can_be_learned(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*many(1), chat("a", "y" * 500), chat("q" * 500, "z")])
    _, metadata = run_prepare(tmp_path / "out", [rows], overlong="truncate")
    assert metadata["total"]["sequences_truncated"] == 1
    assert metadata["total"]["rows_dropped"] == {"overlong": 1}  # its answer lies behind the cut
    assert metadata["splits"]["train"]["longest"] == 128
    assert any(text.endswith("y") for text in decoded(PackedSplit(tmp_path / "out" / "train")))


def test_equal_inputs_give_equal_bytes_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = write_rows(tmp_path / "rows.jsonl", [*many(300), {"bad": 1}])
    second = tmp_path / "elsewhere" / "rows.jsonl"
    second.write_bytes(first.read_bytes())
    run_prepare(tmp_path / "a", [first], source={"split": None})
    run_prepare(tmp_path / "b", [second], source={"split": None})
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    second.write_text(second.read_text().replace("What", "Who"))
    run_prepare(tmp_path / "c", [second], source={"split": None})
    keys = [json.loads((tmp_path / name / "metadata.json").read_text())["key"] for name in "ac"]
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"data"}


def test_rows_keep_their_split_when_the_data_grow(tmp_path: Path) -> None:
    shares = {"train": 0.6, "validation": 0.2, "test": 0.2}
    small, large = many(200), many(100, start=200) + many(200)
    placed = []
    for name, rows in (("small", small), ("large", large)):
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        run_prepare(tmp_path / name, [file], source={"split": None}, splits=shares)
        held_out = {
            split: {row["messages"][0]["content"] for row in rows_of(tmp_path / name, split)}
            for split in ("validation", "test")
        }
        assert not held_out["validation"] & held_out["test"]
        trained = {re.findall(r"What is \d+\?", t)[0] for t in decoded(PackedSplit(tmp_path / name / "train"))}
        assert not trained & (held_out["validation"] | held_out["test"])
        assert len(trained) + sum(map(len, held_out.values())) == len(rows)
        placed.append({**dict.fromkeys(trained, "train"), **{q: s for s, qs in held_out.items() for q in qs}})
    assert placed[0].items() <= placed[1].items()
    assert 20 <= sum(split == "test" for split in placed[0].values()) <= 60


def test_equal_prompts_stay_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n % 50}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(200)]
    shares = {"train": 0.5, "validation": 0.0, "test": 0.5}
    file = write_rows(tmp_path / "rows.jsonl", rows)
    run_prepare(tmp_path / "out", [file], "kto", source={"split": None}, splits=shares)
    train, test = ({row["prompt"][0]["content"] for row in rows_of(tmp_path / "out", s)} for s in ("train", "test"))
    assert train
    assert test
    assert not train & test


def test_the_hash_meets_the_shares() -> None:
    from nemotron_recipes.data.settings import Splits

    keys = [number.to_bytes(32, "big") for number in range(20_000)]
    points = np.array([weight_point(key) for key in keys])
    counts = Counter(split_of(key, Splits(0.7, 0.2, 0.1)) for key in keys)
    shares = {name: count / len(keys) for name, count in counts.items()}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.2, "test": 0.1}, abs=0.02)
    times = copies(points, 2.25)
    assert set(times.tolist()) == {2, 3}
    assert times.mean() == pytest.approx(2.25, abs=0.02)


def test_weights_repeat_and_thin_training_rows_only(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", many(100))
    _, metadata = run_prepare(tmp_path / "out", [file], source={"split": None, "weight": 2.0})
    counted = metadata["splits"]
    assert counted["train"]["sequences"] == 2 * counted["train"]["rows"]
    assert all(counted[name]["sequences"] == counted[name]["rows"] for name in ("validation", "test"))
    _, metadata = run_prepare(tmp_path / "thin", [file], source={"split": "train", "weight": 0.5})
    total = metadata["total"]
    assert total["rows_written"] + total["rows_dropped"]["sampled_out"] == 100
    assert 30 <= total["rows_written"] <= 70


def test_sample_and_rows_limit_each_source(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{n}.jsonl", many(10, start=n * 10)) for n in range(2)]
    _, metadata = run_prepare(tmp_path / "out", files, source={"split": "train", "rows": 5}, sample=3)
    assert [source["rows_read"] for source in metadata["sources"]] == [3, 3]


def test_folders_and_globs(tmp_path: Path) -> None:
    folder = tmp_path / "rows [1]"
    (folder / "deep").mkdir(parents=True)
    write_rows(folder / "b.jsonl", many(2))
    write_rows(folder / "deep" / "a.jsonl", many(3, start=10))
    (folder / "notes.txt").write_text("no rows")
    _, metadata = run_prepare(tmp_path / "whole", [folder])
    assert [file["identity"]["name"] for file in metadata["sources"][0]["files"]] == ["b.jsonl", "deep/a.jsonl"]
    _, metadata = run_prepare(tmp_path / "globbed", [tmp_path / "rows*" / "**" / "*.jsonl"])
    assert metadata["total"]["rows_written"] == 5


@pytest.mark.parametrize("name", ["missing.jsonl", "nothing-*.jsonl", "rows.parquet", "rows.csv"])
def test_sources_without_rows_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    (tmp_path / "rows.csv").write_text("prompt,response")
    with pytest.raises(UserError, match=r"no format that is read|no rows at|no parquet file"):
        run_prepare(tmp_path / "out", [tmp_path / name])


def test_on_bad_row_fail_names_file_and_line(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*many(300), {"messages": []}, *many(5)])
    with pytest.raises(UserError) as caught:
        run_prepare(tmp_path / "out", [file], on_bad_row="fail")
    assert f"{file}, line 301" in str(caught.value)
    assert "empty_conversation" in str(caught.value)


def test_choices_do_not_count_as_bad_rows(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*many(1), chat("a", "b" * 500)])
    _, metadata = run_prepare(tmp_path / "out", [file], on_bad_row="fail")
    assert metadata["total"]["rows_dropped"] == {"overlong": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"(?s)nothing is left to train on: 0 rows read.*1 file\(s\) hold no row at all"),
        ([{"text": "no such field"}], "nothing is left to train on: 1 rows read.* left out: 1 missing_field"),
    ],
)
def test_nothing_to_train_on_is_an_error(tmp_path: Path, rows: list[Any], message: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message):
        run_prepare(tmp_path / "out", [file])


def test_a_lone_surrogate_is_left_out_in_every_method(tmp_path: Path) -> None:
    rows = {
        "sft": [chat("\ud83d", "b"), chat("a", "b")],
        "dpo": [{"prompt": "a", "chosen": "b", "rejected": "\udc00"}, {"prompt": "a", "chosen": "b", "rejected": "c"}],
        "kto": [
            {"prompt": "\ud83d", "completion": "b", "label": True},
            {"prompt": "a", "completion": "b", "label": True},
        ],
        "rl": [{"prompt": "\ud83d", "expected_answer": "b"}, {"prompt": "a", "expected_answer": "b"}],
    }
    for method, content in rows.items():
        file = write_rows(tmp_path / f"{method}.jsonl", content)
        _, metadata = run_prepare(tmp_path / method, [file], method)
        assert metadata["total"]["rows_dropped"] == {"lone_surrogate": 1}
        assert metadata["total"]["rows_written"] == 1


def test_preference_and_rl_rows_carry_messages_and_ids(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    content = {
        "dpo": {"prompt": "a<|im_end|>", "chosen": "b", "rejected": "c", "tools": [tool]},
        "kto": {"prompt": "a<|im_end|>", "completion": "b", "label": False},
        "rl": {"prompt": "a<|im_end|>", "expected_answer": 7, "level": "hard"},
    }
    asked = [{"role": "user", "content": "a<|im_end|>"}]
    expected: dict[str, dict[str, Any]] = {
        "dpo": {"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]},
        "kto": {"completion": [{"role": "assistant", "content": "b"}], "label": False},
        "rl": {"expected_answer": "7", "extra": {"level": "hard"}},
    }
    end = encoder()._ids["<|im_end|>"]
    for method, row in content.items():
        run_prepare(tmp_path / method, [write_rows(tmp_path / f"{method}.jsonl", [row])], method, pack_size=2048)
        (got,) = rows_of(tmp_path / method, "train")
        ids = {name: got.pop(name) for name in list(got) if name.endswith("_ids")}
        assert got.pop("tools", None) == ([tool] if method == "dpo" else None)
        assert got == {"prompt": asked, **expected[method]}
        assert ids["prompt_ids"].count(end) == 2  # after the system and the user turn, not inside the text
        assert ids.keys() == {"prompt_ids", *(f"{name}_ids" for name in expected[method] if name in
                                              ("chosen", "rejected", "completion"))}  # fmt: skip
        for name in ids.keys() - {"prompt_ids"}:
            text = encoder()._tokenizer.decode(ids[name], skip_special_tokens=False)
            assert text == expected[method][name.removesuffix("_ids")][0]["content"] + "<|im_end|>"
        assert rows_of(tmp_path / method, "test") == []


def test_overlong_preference_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b" * 200, "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    _, metadata = run_prepare(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", rows)], "dpo")
    assert metadata["total"]["rows_dropped"] == {"overlong": 1}


@pytest.mark.parametrize(
    ("thinking", "reasons", "opening"),
    [(True, True, "<think>\n"), (True, False, "<think></think>"), (False, True, "<think></think>")],
)
def test_held_out_rows_carry_the_prompt_of_an_evaluation(
    tmp_path: Path, thinking: bool, reasons: bool, opening: str
) -> None:
    (content,) = many(1)
    if reasons:
        content["messages"][1]["reasoning_content"] = "Nothing."
    file = write_rows(tmp_path / "rows.jsonl", [content])
    held_out = {"path": str(file), "split": "test"}
    tree = {"sources": [{"path": str(file), "split": "train"}, held_out], "tokenizer": "tiny", "thinking": thinking}
    (tmp_path / "out").mkdir()
    prepare(Job("sft", read_settings(tree, "sft"), (file, file), tiny_folder(), TEMPLATE), tmp_path / "out")
    (row,) = rows_of(tmp_path / "out", "test")
    assert row["messages"] == content["messages"]
    prompt = encoder()._tokenizer.decode(row["prompt_ids"], skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>user\nWhat is 0?<|im_end|>\n<|im_start|>assistant\n" + opening)


def test_megatron_npy(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", many(50))
    run_prepare(tmp_path / "native", [file])
    _, metadata = run_prepare(tmp_path / "npy", [file], format="megatron_npy")
    names = {path.name for path in (tmp_path / "npy").iterdir() if path.suffix == ".npy"}
    assert names == {"training.npy", "validation.npy", "test.npy"}
    packs = np.load(tmp_path / "npy" / "training.npy", allow_pickle=True)
    native = PackedSplit(tmp_path / "native" / "train")
    assert len(packs) == len(native) == metadata["splits"]["train"]["packs"]
    for pack, one in zip(packs, native, strict=True):
        assert pack == {name: column.tolist() for name, column in one.items()}
    assert len(np.load(tmp_path / "npy" / "test.npy", allow_pickle=True)) == 0


@pytest.mark.parametrize("method", ["rl", "kto", "dpo"])
def test_the_thinking_switch_opens_rl_prompts(tmp_path: Path, method: str) -> None:
    """RL asks as the switch says; preference prompts end where the answers begin."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": True, "expected_answer": "e"}
    file = write_rows(tmp_path / "rows.jsonl", [row])
    for thinking in (True, False):
        output = tmp_path / str(thinking)
        run_prepare(output, [file], method, thinking=thinking)
        ids = rows_of(output, "train")[0]["prompt_ids"]
        opened = encoder()._tokenizer.decode(ids, skip_special_tokens=False).endswith("<think>\n")
        assert opened == (method == "rl" and thinking)


def test_gsm8k(tmp_path: Path) -> None:
    """Real text: all of the test problems as SFT and as RL data, none lost, every answer found."""
    if not GSM8K.is_dir():
        pytest.skip(f"no GSM8K at {GSM8K}: nothing was proved about real text")
    data: dict[str, Any] = {
        "columns": {"prompt": "question", "response": "answer"},
        "answer_pattern": r"#### (.+)$",
        "pack_size": 2048,
    }
    file = GSM8K / "test.jsonl"
    _, sft = run_prepare(tmp_path / "sft", [file], source={"split": None}, **data)
    _, rl = run_prepare(tmp_path / "rl", [file], "rl", source={"split": None}, **data)
    for metadata in (sft, rl):
        assert metadata["total"]["rows_read"] == metadata["total"]["rows_written"] == 1319
    assert sft["splits"]["train"]["packing_efficiency"] > 0.98
    problems = {row["question"]: row["answer"] for row in map(json.loads, file.read_text("utf-8").splitlines())}
    rows = rows_of(tmp_path / "rl", "train")
    assert len(rows) > 1250
    for row in rows:
        assert re.fullmatch(r"-?[\d,.]+", row["expected_answer"])
        assert problems[row["prompt"][0]["content"]].endswith(f"#### {row['expected_answer']}")
    held_out = rows_of(tmp_path / "sft", "test")
    assert all(row["expected_answer"] for row in held_out)
