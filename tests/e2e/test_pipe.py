"""`nemotron nano3 pipe -c tiny` as quickstart runs it: it learns, it can be read back, it continues after a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.rundir import read_jsonl
from tests.helpers.cli import nemotron

pytestmark = pytest.mark.e2e


def results(cwd: Path) -> dict[str, Any]:
    (run, *_) = json.loads(nemotron(cwd, "runs", "list", "--json"))
    return {stage["name"]: stage for stage in run["stages"]}


def learned(cwd: Path) -> None:
    """The demonstration shows learning, not motion."""
    stages = results(cwd)
    sft, dpo, rl = (stages[name]["results"] for name in ("sft", "dpo", "rl"))
    assert sft["exact_match_before"] < 0.05
    assert sft["exact_match_after"] >= 0.40
    assert rl["exact_match_before"] == sft["exact_match_after"], "the same model on the same problems"
    assert rl["exact_match_after"] >= rl["exact_match_before"] + 0.08
    assert dpo["preference_accuracy_after"] > dpo["preference_accuracy_before"]


@dataclass(frozen=True)
class Demo:
    """Where the pipe ran, and what it said."""

    folder: Path
    text: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    return Demo(folder, nemotron(folder, "nano3", "pipe", "-c", "tiny"))


def test_the_whole_pipeline_learns_and_is_not_done_twice(demo: Demo) -> None:
    learned(demo.folder)
    store = Store(demo.folder / "nemotron-output/store")
    stages = results(demo.folder)
    run_dir = Path(json.loads(nemotron(demo.folder, "runs", "show", "pipe", "--json"))["run_dir"])
    for name in ("sft", "dpo", "rl"):
        folder = run_dir / name
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert str(folder / "curves.png") in demo.text
        rows = list(read_jsonl(folder / "metrics.jsonl"))
        assert rows[-1]["step"] == rows[-1]["steps"]
        made = stages[name]["outputs"]["model"]
        store.verify(store.resolve(f"{made['name']}:v{made['version']}"))
    tree = nemotron(demo.folder, "lineage", "nano3-tiny-rl")
    for part in ("nano3-tiny-rl:v1", "nano3-tiny-sft:v1", "nano3-tiny-sft-data:v1", "sample:largest_of_three"):
        assert part in tree
    assert "nothing to run" in nemotron(demo.folder, "nano3", "pipe", "-c", "tiny")

    loads = "import sys, transformers as t; print(type(t.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    model = store.resolve("nano3-tiny-rl").uri
    done = subprocess.run([sys.executable, "-c", loads, model], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "NemotronHForCausalLM", done.stderr


def test_kto_raises_preference_accuracy(demo: Demo) -> None:
    for command in (("data", "prep", "kto"), ("kto",)):
        nemotron(demo.folder, "nano3", *command, "-c", "tiny")
    kto = results(demo.folder)["kto"]["results"]
    assert kto["preference_accuracy_after"] > kto["preference_accuracy_before"]


def test_a_pipe_stops_with_the_cause_and_continues_from_there(tmp_path: Path) -> None:
    short = ("sft.train.train_iters=2", "sft.evaluation.rows=0", "rl.train.train_iters=1", "rl.evaluation.rows=0")
    short = (*short, "dpo.train.train_iters=1", "dpo.evaluation.rows=0")
    # packed data where pairs are needed: only the worker can see what is in it
    text = nemotron(
        tmp_path, "nano3", "pipe", "-c", "tiny", *short, "dpo.data.path=artifact:nano3-tiny-sft-data", code=1
    )
    assert "dpo" in text and "failed" in text
    states = {name: stage["state"] for name, stage in results(tmp_path).items()}
    assert (states["sft"], states["dpo"]) == ("succeeded", "failed")
    assert states["data-prep-rl"] == states["rl"] == "pending", "nothing after the failure has started"
    nemotron(tmp_path, "nano3", "pipe", "-c", "tiny", *short)
    states = {name: stage["state"] for name, stage in results(tmp_path).items()}
    assert states["data-prep-sft"] == states["sft"] == "reused"
    assert states["dpo"] == states["rl"] == "succeeded"


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_it_learns_with_other_seeds(tmp_path: Path, seed: int) -> None:
    nemotron(tmp_path, "nano3", "pipe", "-c", "tiny", *(f"{stage}.train.seed={seed}" for stage in ("sft", "dpo", "rl")))
    learned(tmp_path)
