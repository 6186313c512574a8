"""The commands and the profile of docs/spark-assistant.md and docs/two-backends.md, and files for them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from nemotron_recipes.tiny import tasks
from tests.helpers.cli import ROOT

FILES = {"sft_dataset.jsonl": "sft", "dpo_pairs.jsonl": "dpo", "kto_dataset.jsonl": "kto", "prompts.jsonl": "rl"}


def text(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    """Those that begin with a family: data preparation and training, in order."""
    return re.findall(r"^nemotron ((?:nano3|super3) .*)$", text(name), re.MULTILINE)


def profile() -> str:
    (found,) = re.findall(r"```toml\n(.*?)```", text("spark-assistant"), re.DOTALL)
    return found


def write_files(folder: Path, rows: int) -> None:
    """The data files of the page, about a task that a tiny model can begin to learn."""
    for name, method in FILES.items():
        lines = (json.dumps(row) for row in tasks.rows("largest_of_three", method, "train", rows, 0))
        (folder / name).write_text("\n".join(lines) + "\n")
