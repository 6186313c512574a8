"""Gates at work in data preparation: rows balance, splits stay put, bytes are the same for any number of processes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.data import cuts
from tests.helpers.data_prep import bytes_of, chat, rows_of, run_prepare, write_rows

_WORDS = "amber birch cedar dune ember fjord grove heath inlet jetty knoll larch marsh north ocean pines quay ridge"
WORDS = _WORDS.split()
EVALUATION = "Which of the eighteen words on this list stands for a narrow inlet of the sea?"


def sentence(seed: int, length: int = 30) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def rows() -> list[dict[str, Any]]:
    good = [chat(f"Number {n}: {sentence(n)}?", sentence(n + 50), score=9, license="MIT") for n in range(40)]
    near = [chat(f"Number {n}: {sentence(n)}!", sentence(n + 50), score=9, license="MIT") for n in range(4)]
    return [
        *good,
        *good[:3],  # exact
        *near,
        chat("Please answer:", "no " * 60, score=9, license="MIT"),
        chat("Who?", "Mail me at a@b.example.", score=9, license="MIT"),
        chat("Poor?", "Yes.", score=2, license="MIT"),
        chat("Whose?", "Nobody's.", score=9),
        chat(EVALUATION, "Fjord.", score=9, license="MIT"),
    ]


GATES: dict[str, Any] = {
    "provenance": {"source_field": None, "customer_data_field": None},
    "quality": {"where": ["score >= 7"]},
    "repetition": {},
    "pii": {"action": "redact"},
    "exact_duplicates": {},
    "near_duplicates": {"threshold": 0.7},
}


def gates(tmp_path: Path) -> dict[str, Any]:
    evaluation = write_rows(tmp_path / "eval.jsonl", [{"question": EVALUATION}])
    return {**GATES, "contamination": {"files": [str(evaluation)]}}


def test_every_gate_counts_and_shows_examples(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows())
    report, metadata = run_prepare(tmp_path / "out", [file], pack_size=512, gates=gates(tmp_path))
    counts = {gate: {why: facts["rows"] for why, facts in found.items()} for gate, found in metadata["gates"].items()}
    assert counts == {
        "provenance": {"missing_license": 1},
        "quality": {"low_quality": 1},
        "repetition": {"repetitive": 1},
        "contamination": {"contaminated": 1},
        "pii": {"pii_email": 1},
        "exact_duplicates": {"duplicate": 3},
        "near_duplicates": {"near_duplicate": 4},
    }
    total = report.total
    assert total.read == len(rows()) == total.written + sum(total.dropped.values())
    assert total.written == 41  # the good ones, and the redacted one
    assert report.bad_rows == 0  # what a gate drops is no bad row
    examples = metadata["gates"]["exact_duplicates"]["duplicate"]["examples"]
    assert examples == [f"rows.jsonl, line {41 + n}: like rows.jsonl, line {1 + n}" for n in range(3)]
    assert "b.example" not in json.dumps(metadata)


def test_redacted_rows_are_written_redacted(tmp_path: Path) -> None:
    mine = [chat("Who?", "Mail me at a@b.example."), chat("a", "b")]
    file = write_rows(tmp_path / "rows.jsonl", mine)
    train = write_rows(tmp_path / "train.jsonl", [chat("x", "y")])
    sources = [{"path": str(file), "split": "test"}, {"path": str(train), "split": "train"}]
    run_prepare(tmp_path / "out", [file, train], sources=sources, gates={"pii": {"action": "redact"}})
    assert [row["messages"][1]["content"] for row in rows_of(tmp_path / "out", "test")] == ["Mail me at [EMAIL].", "b"]


def test_predefined_splits_stay_and_leaks_go(tmp_path: Path) -> None:
    """Held-out rows that training has are dropped, never moved; without a predefined split redaction moves no row."""
    train = write_rows(tmp_path / "train.jsonl", [chat(f"q{n} {sentence(n)}", sentence(n)) for n in range(20)])
    test = write_rows(tmp_path / "test.jsonl", [
        chat(f"q3 {sentence(3)}", sentence(3)),  # the same
        chat(f"q4 {sentence(4)}!", sentence(4)),  # nearly
        chat(f"other {sentence(77)}", sentence(78)),
    ])  # fmt: skip
    sources = [{"path": str(test), "split": "test"}, {"path": str(train), "split": "train"}]
    report, metadata = run_prepare(tmp_path / "out", [test, train], sources=sources, pack_size=512,
                                   gates={"exact_duplicates": {}, "near_duplicates": {"threshold": 0.7}})  # fmt: skip
    assert {name: facts.rows for name, facts in report.splits.items()} == {"train": 20, "validation": 0, "test": 1}
    assert report.total.dropped == {"in_training": 1, "near_training": 1}
    assert metadata["sources"][0]["rows_dropped"] == {"in_training": 1, "near_training": 1}
    assert metadata["sources"][1]["rows_dropped"] == {}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_any_number_of_processes_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    found = rows()
    if method == "dpo":
        found = [{**row, "prompt": row["messages"][0]["content"], "chosen": row["messages"][1]["content"],
                  "rejected": "I don't know."} for row in found]  # fmt: skip
    file = write_rows(tmp_path / "rows.jsonl", found)
    chosen = gates(tmp_path)
    outputs = []
    for name, workers in (("one", 1), ("two", 2)):
        if workers > 1:
            monkeypatch.setattr(cuts, "SHARD_BYTES", 1 << 12)
        run_prepare(tmp_path / name, [file], method, pack_size=512, workers=workers, gates=chosen)
        outputs.append(bytes_of(tmp_path / name))
    assert outputs[0].keys() == outputs[1].keys()
    assert all(outputs[0][name] == outputs[1][name] for name in outputs[0])
