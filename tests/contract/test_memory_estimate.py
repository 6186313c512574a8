"""Our memory formulas against Megatron-Bridge's own estimator, and against figures that NVIDIA has published.

That estimator knows dense transformers alone. What it answered is checked in with the question; the long test asks the
real package again.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.backends import schemas
from nemotron_recipes.backends.layout import Layout
from nemotron_recipes.sizing import tables
from nemotron_recipes.sizing.footprint import Footprint
from nemotron_recipes.sizing.lora import Lora
from nemotron_recipes.sizing.memory import GIB, Batch, memory, trained_parameters
from nemotron_recipes.sizing.shape import Shape
from tests.helpers import real_megatron

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).parent / "records" / "megatron_bridge-0.3.1-memory.json"
BRIDGE = Footprint(weight=2, gradient=4, optimizer=12, shards_optimizer=True, logit=4)
AUTOMODEL = Footprint(2, 2, 4, shards_weights=True, shards_gradients=True, shards_optimizer=True)
# layers, hidden, heads, width of the MLP, vocabulary, gated
MODELS = {"gpt-2.7b": (32, 2560, 32, 10240, 51200, False), "llama-7b": (32, 4096, 32, 11008, 32000, True)}
# tensor, pipeline, data parallel, tokens, micro batch, micro batches, distributed optimizer
RUNS = [
    (1, 1, 1, 2048, 1, 8, False),
    (2, 1, 4, 4096, 2, 8, True),
    (4, 2, 2, 8192, 1, 16, True),
    (8, 4, 8, 4096, 4, 2, True),
]
CASES = [(name, run) for name in MODELS for run in RUNS]
LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj")


def question() -> list[dict[str, Any]]:
    told = []
    for name, (tensor, pipeline, data, tokens, micro, number, distributed) in CASES:
        layers, hidden, heads, width, vocab, gated = MODELS[name]
        model = {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_query_groups": heads,
            "kv_channels": hidden // heads,
            "ffn_hidden_size": width,
            "gated_linear_unit": gated,
            "vocab_size": vocab,
            "seq_length": tokens,
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
        }
        told.append(
            {
                "model": model,
                "micro_batch_size": micro,
                "num_microbatches": number,
                "data_parallel_size": data,
                "use_distributed_optimizer": distributed,
            }
        )
    return told


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{n % len(RUNS)}")
def test_within_five_per_cent_of_megatron_bridges_own_estimator(number: int) -> None:
    record = json.loads(RECORD.read_text())
    assert record["question"] == question(), "run the long test with --update-golden"
    name, (tensor, pipeline, data, tokens, micro, micros, distributed) = CASES[number]
    layers, hidden, heads, width, vocab, gated = MODELS[name]
    shape = Shape(name, "*-" * layers, hidden, vocab, heads, heads, hidden // heads, width, gated)
    layout = Layout(tensor * pipeline * data, tensor, pipeline, sequence_parallel=True)
    footprint = Footprint(2, 4, 12, shards_optimizer=distributed, logit=4)
    ours = memory(shape, layout, Batch(tokens, micro, micros), footprint, None)
    theirs = record["answer"][number]
    kept = ours.weights + ours.gradients + ours.optimizer
    assert kept == pytest.approx(theirs["weights_and_optimizer"], rel=0.01)
    if not gated:  # theirs counts a gate's parameters, but not what it keeps
        assert ours.needed == pytest.approx(sum(theirs.values()), rel=0.05)
        masks = 2 * tokens * micro * hidden * layers * min(1, micros / pipeline) / tensor  # of dropout: there is none
        assert ours.activations + ours.logits + masks == pytest.approx(theirs["activations"], rel=0.05)


@pytest.mark.parametrize(
    ("processes", "tensor", "expert", "published"),
    [(1, 1, 1, 58.8), (2, 1, 2, 31.5), (4, 1, 4, 17.8), (8, 1, 8, 10.9), (16, 2, 8, 8.9)],
)
def test_nano3_weights_per_gpu_on_megatron_bridge(processes: int, tensor: int, expert: int, published: float) -> None:
    """NVIDIA-NeMo/Nemotron 18fb9673981003fd8ad04a8844abc93251007b10, nemotron3-nano-post-training-sizing.md, part 4."""
    layout = Layout(processes, tensor=tensor, expert=expert, sequence_parallel=tensor > 1)
    frozen = memory(tables.shapes()["nano3"], layout, Batch(2048, 1, 1), BRIDGE, Lora(1, ("no layer",)))
    assert frozen.weights / GIB == pytest.approx(published, abs=0.1)
    assert frozen.gradients == frozen.optimizer == 0


@pytest.mark.parametrize(("processes", "expert", "published"), [(4, 4, 14.7), (8, 8, 7.4)])
def test_nano3_weights_per_gpu_on_automodel(processes: int, expert: int, published: float) -> None:
    """The same page."""
    layout = Layout(processes, expert=expert)
    frozen = memory(tables.shapes()["nano3"], layout, Batch(2048, 1, 1), AUTOMODEL, Lora(1, ("no layer",)))
    assert frozen.weights / GIB == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize(("rank", "published"), [(8, 219e6), (32, 878e6)])
def test_nano3_adapters(rank: int, published: float) -> None:
    """The same page: every linear layer but Mamba's out_proj."""
    assert trained_parameters(tables.shapes()["nano3"], Lora(rank, LORA_TARGETS)) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("tokens", [2048, 4096, 16384])
def test_nano3_activations_are_at_most_a_quarter_above_the_published_ones(tokens: int) -> None:
    """The same page, part 3: about 3 GiB per 1024 tokens, on 8 GPUs with EP 8. CERTAIN_SHARE stands for the rest."""
    takes = memory(tables.shapes()["nano3"], Layout(8, expert=8), Batch(tokens, 1, 1), BRIDGE, Lora(32, LORA_TARGETS))
    published = 3 * GIB * tokens / 1024
    assert published < takes.activations < 1.25 * published


@pytest.mark.long
def test_the_record_is_the_real_estimator(pytestconfig: pytest.Config) -> None:
    python = real_megatron.python(checked=True)
    stubs = schemas.load(real_megatron.VERSION).content["stubs"]
    done = subprocess.run(
        [python, ROOT / "tools/schemas/memory_megatron_bridge.py", ",".join(stubs)],
        input=json.dumps(question()),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = {"question": question(), "answer": json.loads(done.stdout)}
    if pytestconfig.getoption("--update-golden"):
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    assert json.loads(RECORD.read_text()) == record
