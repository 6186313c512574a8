"""The data card, and rows as `data show` shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from nemotron_recipes.cli.data import as_text
from nemotron_recipes.data.card import markdown
from nemotron_recipes.data.card_plot import draw
from nemotron_recipes.data.convert import convert
from nemotron_recipes.data.show import load_tokenizer, read_metadata, show_row
from nemotron_recipes.errors import UserError
from nemotron_recipes.report.data import row_page
from tests.helpers.cli import nemotron
from tests.helpers.data_prep import chat, run_prepare, tiny_folder, write_rows

HOSTILE = "a\x1b[31mred\x07 <script>alert(1)</script> | `code` **b**"


def read_card(output: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((output / "data-card.json").read_text(encoding="utf-8"))
    return card


def test_a_card_says_what_became_of_the_rows(tmp_path: Path) -> None:
    rows = [*(chat(f"q{n}", "a" * n) for n in range(1, 60)), {"messages": [{"role": HOSTILE}]}, chat("q", "z" * 500)]
    file = write_rows(tmp_path / "rows.jsonl", [*rows, chat("q1", "a"), chat("mail", "to a@b.example")])
    _, metadata = run_prepare(
        tmp_path / "out", [file], source={"split": "train", "license": "CC-BY-4.0", "origin": "made by `hand`"},
        gates={"pii": {"action": "report"}, "exact_duplicates": {}},
    )  # fmt: skip
    card = read_card(tmp_path / "out")
    assert {one["reason"]: (one["gate"], one["rows"]) for one in card["removed"]} == {
        "unknown_role": (None, 1), "overlong": (None, 1), "duplicate": ("exact_duplicates", 1)
    }  # fmt: skip
    assert sum(one["rows"] for one in card["removed"]) == card["total"]["rows_read"] - card["total"]["rows_written"]
    assert card["noted"][0]["reason"] == "pii_email"
    assert card["sources"][0]["license"] == "CC-BY-4.0"
    assert card["gates"] == ["pii", "exact_duplicates"]
    train = card["splits"]["train"]
    assert sum(train["length_counts"]) == train["sequences"] == 60
    assert sum(train["length_tokens"]) == train["tokens"]
    assert "1 rows hold personal data or credentials, and are in the data (data.gates.pii.action)" in card["risks"]
    assert any("evaluation" in risk for risk in card["risks"])
    text = (tmp_path / "out" / "data-card.md").read_text(encoding="utf-8")
    assert "made by \\`hand\\`" in text
    assert "\x1b" not in text
    assert "`rows.jsonl, line 60: messages[0] has role" in text
    with Image.open(tmp_path / "out" / "data-card.png") as picture:
        assert picture.size == (640, 480)
    assert {"data-card.json", "data-card.md", "data-card.png"} <= metadata["files"].keys()


@pytest.mark.parametrize(("method", "row"), [
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("kto", {"prompt": "a", "completion": "b", "label": True}),
    ("rl", {"prompt": "a", "expected_answer": "b"}),
])  # fmt: skip
def test_preference_and_rl_cards(tmp_path: Path, method: str, row: dict[str, Any]) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [row, row])
    run_prepare(tmp_path / "out", [file], method, source={"split": "train", "weight": 2.0})
    train = read_card(tmp_path / "out")["splits"]["train"]
    assert sum(train["length_counts"]) == train["sequences"] == 4


def test_the_hostile_stays_text_in_markdown(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [chat("a", "b")])
    run_prepare(tmp_path / "out", [file])
    card = read_card(tmp_path / "out")
    card["removed"] = [{"reason": "r", "gate": "g", "rows": 1, "examples": [HOSTILE]}]
    card["sources"][0]["origin"] = HOSTILE
    lines = markdown(card).splitlines()
    removed = next(line for line in lines if line.startswith("| r |"))
    assert removed == "| r | g | 1 | `a\\x1b[31mred\\x07 <script>alert(1)</script> \\| 'code' **b**` |"
    origin = next(line for line in lines if line.startswith("| `source-0`"))
    assert "<script" not in origin
    assert "\\*\\*b\\*\\*" in origin


def test_a_histogram_draws_every_bin() -> None:
    import io

    picture = Image.open(io.BytesIO(draw({"T": {"train": [1, 0, 400], "test": [0, 0, 0]}}, 10.0)))
    colours = [picture.getpixel((x, picture.height - 45)) for x in range(70, 624)]
    blue = [colour == (21, 88, 176) for colour in colours]
    assert blue[5]
    assert not any(blue[190:360])
    assert blue[375]  # the third of three


def shown(output: Path, number: int, split: str = "train") -> Any:
    metadata = read_metadata(output)
    return show_row(output, metadata, load_tokenizer(tiny_folder(), metadata), split, number)


@pytest.mark.parametrize("form", ["native", "parquet", "megatron_npy"])
def test_every_row_is_shown_with_what_it_learns(tmp_path: Path, form: str) -> None:
    rows = [chat(f"q{n}", f"a{n} ", n=n) for n in range(40)]
    run_prepare(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", rows)], format=form)
    found = set()
    for number in range(40):
        (part,) = shown(tmp_path / "out", number).parts
        text = "".join(piece.text for piece in part.pieces)
        assert text.startswith("<|im_start|>system\n")
        (learned,) = (piece for piece in part.pieces if piece.learned)
        found.add(learned.text)
        assert f"q{learned.text.split('<')[0].strip()[1:]}<|im_end|>" in text
    assert found == {f"a{n}<|im_end|>" for n in range(40)}


def test_preference_rows_are_shown_with_both_answers(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "yes", "rejected": "no"}
    run_prepare(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", [row])], "dpo")
    found = shown(tmp_path / "out", 0)
    assert [(part.title, part.pieces[-1].text) for part in found.parts] == [
        ("chosen", "yes<|im_end|>"), ("rejected", "no<|im_end|>")
    ]  # fmt: skip


def test_rows_can_steer_neither_terminal_nor_browser(tmp_path: Path) -> None:
    run_prepare(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", [chat(HOSTILE, HOSTILE)])])
    found = shown(tmp_path / "out", 0)
    plain, coloured = (as_text("name", found, colour) for colour in (False, True))
    assert "\x1b" not in plain
    assert "⟦a\\x1b[31mred\\x07" in plain
    assert coloured.count("\x1b") == 2  # our own colour, and its end
    page = row_page("name", found)
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") == 2
    assert "<mark title=" in page
    assert "default-src 'none'" in page


def test_wrong_requests(tmp_path: Path) -> None:
    run_prepare(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", [chat("a", "b")])])
    for arguments, message in (
        ((1, "train"), "rows are 0 to 0"), ((-1, "train"), "no row -1"), ((0, "tain"), "did you mean 'train'"),
        ((0, "test"), "the test split is empty"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            shown(tmp_path / "out", *arguments)
    with pytest.raises(UserError, match="no prepared data"):
        read_metadata(tmp_path)
    metadata = read_metadata(tmp_path / "out")
    tree = json.loads((tiny_folder() / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="not the tokenizer that made these data"):
        load_tokenizer(tmp_path, metadata)
    convert(tmp_path / "out", tmp_path / "indexed", "megatron_indexed")
    with pytest.raises(UserError, match="layout megatron_indexed can't be shown"):
        shown(tmp_path / "indexed", 0)


def test_an_overlapping_character_is_not_a_crash(tmp_path: Path) -> None:
    """Runs of learned tokens may cut a character's bytes apart."""
    metadata = {"tokenizer": {"digest": ""}, "method": "dpo", "splits": {"train": {"sequences": 1}}}
    tokenizer = Tokenizer.from_file(str(tiny_folder() / "tokenizer.json"))
    ids = tokenizer.encode("é", add_special_tokens=False).ids
    (tmp_path / "train").mkdir()
    row = {"prompt_ids": ids[:1], "chosen_ids": ids[1:] or ids, "rejected_ids": ids}
    (tmp_path / "train" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert len(show_row(tmp_path, metadata, tokenizer, "train", 0).parts) == 2
    assert np.array(ids).size


def test_from_the_command_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [chat("Question", "Answer")])
    source = "data.sources=[{path: rows.jsonl, split: train}]"
    nemotron(tmp_path, "nano3", "data", "prep", "sft", source, "data.tokenizer=tiny", "data.gates.pii.action=drop")
    assert "⟦Answer<|im_end|>⟧" in nemotron(tmp_path, "data", "show", "nano3-sft-data", "--row", "0")
    assert "# Data card" in nemotron(tmp_path, "data", "show", "nano3-sft-data:v1")
    nemotron(tmp_path, "data", "show", "nano3-sft-data", "--row", "0", "--html", "row.html")
    assert "<mark" in (tmp_path / "row.html").read_text()
    nemotron(tmp_path, "data", "show", "nano3-sft-data", "--row", "1", code=2)
    folder = tmp_path / "nemotron-output" / "store" / "nano3-sft-data" / "v1"
    nemotron(tmp_path, "data", "show", str(folder), "--row", "0", code=2)  # a folder doesn't say which tokenizer
    assert "⟦" in nemotron(tmp_path, "data", "show", str(folder), "--row", "0", "--tokenizer", str(tiny_folder()))
