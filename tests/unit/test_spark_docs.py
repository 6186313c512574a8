"""docs/spark-assistant.md and docs/two-backends.md: every command plans, with the profile that stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.store import Store
from tests.helpers.cli import nemotron
from tests.helpers.spark_docs import FILES, commands, profile

COMMANDS = list(dict.fromkeys([*commands("spark-assistant"), *commands("two-backends")]))
MADE = {  # of the commands before
    "data": ("nano3-sft-data", "nano3-dpo-data", "nano3-kto-data", "nano3-rl-data", "super3-spark-sft-data"),
    "model": ("nano3-spark-sft", "nano3-spark-dpo"),
}


def test_there_are_commands_for_every_stage() -> None:
    stages = {" ".join(shlex.split(command)[1:4]) for command in COMMANDS}
    assert {"data prep sft", "data prep dpo", "data prep kto", "data prep rl"} <= stages
    assert {"sft -c spark", "dpo -c spark", "kto -c spark", "rl -c spark", "sft -c spark-qlora"} <= stages


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_plans(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-this-test")
    (tmp_path / "env.toml").write_text(profile())
    for name in FILES:
        (tmp_path / name).write_text("{}\n")
    store = Store(tmp_path / "nemotron-output" / "store")
    for kind, names in MADE.items():
        for name in names:
            staged = store.stage(name)
            (staged.content / "content.txt").write_text("made by a test")
            store.commit(staged, kind=kind)
    words = [*shlex.split(command), "--dry-run", "--offline"]
    if "spark-qlora" in command and "--smoke" not in command:  # nobody has shown here that it fits
        nemotron(tmp_path, *words, code=2)
        return
    said = nemotron(tmp_path, *words)
    assert "docker run --detach" in said
    assert "memory_stop_gib: 6.0" in said


def test_the_profile_is_the_one_of_the_image(tmp_path: Path) -> None:
    (image,) = re.findall(r'container_image = "(.*)"', profile())
    assert image in nemotron(tmp_path, "images", "list")
