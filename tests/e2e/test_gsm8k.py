"""Real text through the whole pipeline: GSM8K -> data prep -> SFT -> GRPO, by the commands a user types.

A model this small earns hardly any reward on it. What this proves: every row is accounted for, the mask covers the
answers, the loss falls, reward parsing finds the reference answers, and the lineage goes back to the files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.data.packed import PackedSplit
from nemotron_recipes.rundir import read_jsonl
from tests.helpers.cli import ROOT, nemotron

GSM8K = ROOT.parent / "shared/data/gsm8k"
ROWS = 120  # of each file

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (GSM8K / "train.jsonl").exists():
        pytest.skip(f"no GSM8K at {GSM8K}: nothing of this file was proved")
    return tmp_path_factory.mktemp("gsm8k")


@pytest.mark.long
def test_gsm8k_from_rows_to_a_trained_model(folder: Path) -> None:
    sources = (
        f"data.sources=[{{path: '{GSM8K}/train.jsonl', split: train}}, {{path: '{GSM8K}/test.jsonl', split: test}}]"
    )
    common = (sources, "data.tokenizer=tiny", "data.pack_size=768", "--sample", str(ROWS))
    store = Store(folder / "nemotron-output/store")

    nemotron(folder, "nano3", "data", "prep", "sft", *common)
    data = Path(store.resolve("nano3-sft-data").uri)
    metadata = json.loads((data / "metadata.json").read_text())
    for source in metadata["sources"]:
        assert source["rows_read"] == ROWS == source["rows_written"] + sum(source["rows_dropped"].values()), source
    packs = PackedSplit(data / "train")
    trained = sum(int(packs[i]["loss_mask"].sum()) for i in range(len(packs)))
    total = sum(len(packs[i]["input_ids"]) for i in range(len(packs)))
    assert 0.3 < trained / total < 0.9, "answers are learned, questions are not"
    assert all(len(packs[i]["input_ids"]) <= 768 for i in range(len(packs)))
    assert np.load(data / "train/input_ids.npy", mmap_mode="r", allow_pickle=False).dtype == np.int32

    nemotron(
        folder, "nano3", "sft", "-c", "tiny", "data.path=artifact:nano3-sft-data", "outputs.model=gsm-sft",
        "train.train_iters=12", "train.global_batch_size=6", "train.micro_batch_size=3", "evaluation.rows=0",
    )  # fmt: skip
    (metrics,) = (folder / "nemotron-output/runs").glob("*/sft/metrics.jsonl")
    losses = [row["loss"] for row in read_jsonl(metrics) if "loss" in row]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0], losses

    nemotron(folder, "nano3", "data", "prep", "rl", *common, "data.answer_pattern='#### (.+)$'")
    rows = list(read_jsonl(Path(store.resolve("nano3-rl-data").uri) / "train/rows.jsonl"))
    reference = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text().splitlines()[:ROWS]]
    wanted = {r["question"]: r["answer"].split("#### ")[1] for r in reference}
    assert {r["prompt"][-1]["content"]: r["expected_answer"] for r in rows} == wanted

    text = nemotron(
        folder, "nano3", "rl", "-c", "tiny", "data.path=artifact:nano3-rl-data", "model.path=artifact:gsm-sft",
        "outputs.model=gsm-rl", "train.train_iters=2", "train.global_batch_size=16", "train.micro_batch_size=16",
        "grpo.max_completion_length=12", "evaluation.rows=8", "evaluation.max_new_tokens=12",
    )  # fmt: skip
    (metrics,) = (folder / "nemotron-output/runs").glob("*/rl/metrics.jsonl")
    no_signal = all(row["frac_reward_zero_std"] == 1.0 for row in read_jsonl(metrics))
    assert ("nothing was learned" in text) == no_signal
    tree = nemotron(folder, "lineage", "gsm-rl")
    for part in ("gsm-rl:v1", "gsm-sft:v1", "nano3-sft-data:v1", "nano3-rl-data:v1", f"{GSM8K}/train.jsonl"):
        assert part in tree
    for name in ("nano3-sft-data", "gsm-sft", "nano3-rl-data", "gsm-rl"):
        store.verify(store.resolve(name))
