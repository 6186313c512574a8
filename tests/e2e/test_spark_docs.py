"""The pages for a DGX Spark, as far as a CPU goes: their commands train the tiny model, without Unsloth."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.store import Store
from tests.helpers.cli import nemotron
from tests.helpers.spark_docs import commands, write_files

pytestmark = pytest.mark.e2e

# The watchdog's limits of a small machine; all else as the page has it, but for the container.
PROFILE = '[spark]\nexecutor = "local"\nmemory_reserve_gib = 0.1\nmemory_stop_gib = 0.1\n'
TINY_DATA = ("data.tokenizer=tiny", "data.pack_size=128", "data.splits={train: 0.8, validation: 0.1, test: 0.1}")
TINY_TRAINING = (
    *("train.global_batch_size=4", "train.micro_batch_size=2", "evaluation.rows=0"),
    *("model.dtype=float32", "scheduler.lr_warmup_iters=0"),
)
SHORT = "train.train_iters=3"
NOT_UNDER_UNSLOTH = re.compile(r"TRL \(not under Unsloth: .+\)$")  # not installed, or installed and without a GPU


def run(folder: Path, command: str) -> None:
    """A command of a page, on the tiny model; a run that the page leaves alone is waited for."""
    words = shlex.split(command)
    if "--batch" in words:
        words.append("--wait")
    if words[1] == "data":
        nemotron(folder, *words, *TINY_DATA)
        return
    more = [*TINY_TRAINING, *(() if "--smoke" in words else (SHORT,))]
    if words[1] == "sft":
        more.append("model=tiny")
    if "backend=trl" not in words:
        more.append("backend.native.require_unsloth=false")
    if words[1] == "rl":
        more += ["train.micro_batch_size=8", "train.global_batch_size=8", "grpo.max_completion_length=4"]
    nemotron(folder, *[word.replace("50", "5") if word == "50" else word for word in words], *more)


def merged(folder: Path, name: str) -> None:
    """The artifact is a whole model, with the adapters beside it (that such a one loads: test_unsloth_worker.py)."""
    model = Path(Store(folder / "nemotron-output" / "store").resolve(name).uri)
    assert (model / "config.json").is_file() and (model / "model.safetensors").is_file()
    assert (model / "adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "env.toml").write_text(PROFILE)
    write_files(tmp_path, 40)
    return tmp_path


@pytest.mark.long
def test_one_recipe_two_backends(project: Path) -> None:
    page = commands("two-backends")
    assert len(page) == 3
    for command in page:
        run(project, command)
    merged(project, "nano3-under-unsloth")
    merged(project, "nano3-with-trl")
    runs = [run["id"] for run in json.loads(nemotron(project, "runs", "list", "--json")) if "data" not in run["id"]]
    told = json.loads(nemotron(project, "runs", "compare", *runs, "--json"))
    stages = [run["stages"]["sft"] for run in told["runs"]]
    with_trl, other = sorted(stage["facts"]["trained_with"] for stage in stages)
    assert with_trl == "TRL" and NOT_UNDER_UNSLOTH.match(other), "which of the two reasons, this machine says"
    assert all(stage["seconds_per_step"] and stage["memory_bytes"] and stage["wall_seconds"] for stage in stages)
    assert set(told["config"]["sft.backend.name"]) == {"trl", "unsloth"}
    assert stages[0]["results"]["loss"] == pytest.approx(stages[1]["results"]["loss"], rel=1e-4), "one worker"
    assert "not under Unsloth" in nemotron(project, "runs", "compare", *runs)


@pytest.mark.long
def test_from_three_files_to_a_model(project: Path) -> None:
    for command in commands("spark-assistant"):
        if not command.startswith("super3"):
            run(project, command)
    for name in ("sft", "dpo", "kto", "rl"):
        merged(project, f"nano3-spark-{name}")
    lineage = nemotron(project, "lineage", "nano3-spark-rl")
    assert all(f"nano3-spark-{name}:v1" in lineage for name in ("sft", "dpo", "rl"))
    shown = json.loads(nemotron(project, "artifacts", "show", "nano3-spark-rl", "--json"))
    assert NOT_UNDER_UNSLOTH.match(shown["metadata"]["trained_with"])
    (newest, *_) = [run["id"] for run in json.loads(nemotron(project, "runs", "list", "--json"))]
    assert "trained with" in nemotron(project, "runs", "show", newest)
