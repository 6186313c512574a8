"""Every command of docs/spark-assistant.md plans, with the profile that stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.store import Store
from tests.helpers.cli import ROOT, nemotron

TEXT = (ROOT / "docs/spark-assistant.md").read_text(encoding="utf-8")
COMMANDS = [line for line in re.findall(r"^nemotron (.*)$", TEXT, re.MULTILINE) if line.startswith("nano3 ")]


def test_there_are_commands_for_every_stage() -> None:
    stages = {" ".join(shlex.split(command)[1:4]) for command in COMMANDS}
    assert {"data prep sft", "data prep dpo", "data prep kto", "sft -c spark", "dpo -c spark"} <= stages


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_plans(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-this-test")
    (profile,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "env.toml").write_text(profile)
    for name in ("sft_dataset", "dpo_pairs", "kto_dataset"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    store = Store(tmp_path / "nemotron-output" / "store")
    for name in ("nano3-sft-data", "nano3-dpo-data", "nano3-kto-data", "nano3-spark-sft"):  # of the commands before
        staged = store.stage(name)
        (staged.content / "content.txt").write_text("made by a test")
        store.commit(staged, kind="model" if name == "nano3-spark-sft" else "data")
    said = nemotron(tmp_path, *shlex.split(command), "--dry-run", "--offline")
    assert "docker run --detach" in said
    assert "memory_stop_gib: 6.0" in said
