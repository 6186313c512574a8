"""Preparations of rows of every kind, for tests that compare their bytes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.data import cuts
from nemotron_recipes.data.job import Job, Progress, Report
from nemotron_recipes.data.metadata import write_metadata
from nemotron_recipes.data.prepare import prepare
from nemotron_recipes.data.settings import read_settings
from tests.helpers.data_prep import TEMPLATE, chat, tiny_folder


def varied(count: int, seed: int = 0) -> list[Any]:
    """Rows of every kind: several lengths, thoughts, held-out ones, bad ones."""
    random_ = random.Random(seed)
    rows: list[Any] = []
    for number in range(count):
        row = chat(f"What is {number}?", "It is " + "so " * random_.randint(1, 40) + str(number))
        if number % 7 == 0:
            row["messages"][1]["reasoning_content"] = "Let me see.\n"
        if number % 11 == 0:
            row["messages"][1]["content"] += "<|im_end|>é"
        if number % 13 == 0:
            row = {"messages": number}
        rows.append(row)
    return rows


def job(file: Path | str, spools: Path | None = None, **data: Any) -> Job:
    source = {"path": str(file), "weight": data.pop("weight", 1.5)}
    tree = {"sources": [source], "tokenizer": "tiny", "pack_size": 128, "workers": 1, **data}
    return Job("sft", read_settings(tree, "sft"), (file,), tiny_folder(), TEMPLATE, spools=spools)


def run(made: Job, output: Path, progress: Progress | None = None) -> Report:
    output.mkdir(parents=True)
    report = prepare(made, output, progress)
    write_metadata(made, report, output)
    return report


def cut(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(cuts, "SHARD_BYTES", size)
