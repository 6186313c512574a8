"""Parameters, rules of a model, memory, and the layouts that a search finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.backends.layout import Layout
from nemotron_recipes.sizing import parameters, policy, tables
from nemotron_recipes.sizing.footprint import NF4_BYTES, Footprint, footprint
from nemotron_recipes.sizing.lora import Lora
from nemotron_recipes.sizing.memory import GIB, Batch, memory
from nemotron_recipes.sizing.rules import model_problems, tensor_sizes
from nemotron_recipes.sizing.shape import from_hf_config
from nemotron_recipes.sizing.stage import sequence_of
from nemotron_recipes.spec import Artifact
from nemotron_recipes.tiny.tokenizer import vocabulary_size
from tests.helpers.training import ARCH

BRIDGE = Footprint(weight=2, gradient=4, optimizer=12, shards_optimizer=True)
BATCH = Batch(4096, 1, 8)


@pytest.mark.parametrize(
    ("name", "total", "active"), [("nano3", 31.6, 3.6), ("super3", 120.6, 12.7), ("r1-qwen3-8b", 8.2, 8.2)]
)
def test_parameters_are_the_published_ones(name: str, total: float, active: float) -> None:
    shape = tables.shapes()[name]
    assert shape.verified
    assert tables.published()[name] == pytest.approx({"total": total * 1e9, "active": active * 1e9})
    routers = parameters.routers(shape)  # which the published figures leave out
    assert [round((count - routers) / 1e9, 1) for count in (parameters.total(shape), parameters.active(shape))] == [
        total,
        active,
    ]


def test_ultra_agrees_with_its_published_totals_but_is_not_verified() -> None:
    shape = tables.shapes()["ultra3"]
    assert not shape.verified
    assert parameters.total(shape) / 1e9 == pytest.approx(550, rel=0.002)
    with_prediction = parameters.total(shape) + parameters.prediction(shape)
    assert with_prediction / 1e9 == pytest.approx(561, rel=0.002)  # as the hub counts it


CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"num_key_value_heads": 2},
    "MistralConfig": {"num_key_value_heads": 2, "head_dim": 8},
    "Qwen2Config": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen3Config": {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False},
    "MixtralConfig": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeConfig": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 1,
    },
}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


def test_shapes_count_what_the_real_models_have() -> None:
    """Transformers' own classes on the meta device: no memory, every parameter."""
    import torch
    import transformers

    def real(config: Any) -> int:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        return sum(parameter.numel() for parameter in model.parameters())

    for name, extra in CONFIGS.items():
        config = getattr(transformers, name)(**{**SMALL, **extra})
        shape = from_hf_config(json.loads(config.to_json_string(use_diff=False)), name)
        assert shape is not None and parameters.total(shape) == real(config), name
    kinds = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    for name in ("nano3", "super3"):  # their first nine layers, of every kind
        shape = replace(tables.shapes()[name], pattern=tables.shapes()[name].pattern[:9], mtp_pattern="")
        assert {*shape.pattern} == {"M", "E", "*"}
        config = transformers.NemotronHConfig(
            layers_block_type=[kinds[letter] for letter in shape.pattern],
            hidden_size=shape.hidden,
            vocab_size=shape.vocab,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            mamba_num_heads=shape.mamba_heads,
            mamba_head_dim=shape.mamba_head_dim,
            ssm_state_size=shape.mamba_state,
            n_groups=shape.mamba_groups,
            n_routed_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            moe_intermediate_size=shape.expert_ffn,
            moe_shared_expert_intermediate_size=shape.shared_ffn,
            moe_latent_size=shape.latent or None,
        )
        assert parameters.total(shape) == real(config), name
        again = from_hf_config(json.loads(config.to_json_string(use_diff=False)), name)
        assert again is not None and parameters.total(again) == parameters.total(shape)
        assert (again.pattern, again.latent, again.experts) == (shape.pattern, shape.latent, shape.experts)
    tiny = tables.shape_of(Artifact("builtin", "model", "tiny"), ARCH)
    config = transformers.NemotronHConfig(vocab_size=vocabulary_size(), **ARCH)
    assert tiny is not None and parameters.total(tiny) == real(config)


def test_where_a_shape_comes_from(tmp_path: Path) -> None:
    nano = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    assert tables.shape_of(Artifact("hub", "model", nano), {}) is tables.shapes()["nano3"]
    config = {**SMALL, "model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2}
    folder = tmp_path / "hub/models--ORG--NAME/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    here = {"HF_HOME": str(tmp_path)}
    cached = tables.shape_of(Artifact("hub", "model", "ORG/NAME", revision="abc"), {}, here)
    assert cached is not None and (cached.hidden, cached.verified) == (64, True)
    assert tables.shape_of(Artifact("path", "model", uri=str(folder)), {}) is not None
    assert tables.shape_of(Artifact("hub", "model", "ORG/NAME"), {}, here) is None, "not pinned"
    assert tables.shape_of(Artifact("hub", "model", "ORG/OTHER", revision="abc"), {}, here) is None
    (folder / "config.json").write_text("{")
    assert tables.shape_of(Artifact("path", "model", uri=str(folder)), {}) is None
    heads = ({**config, "num_attention_heads": number} for number in (None, 0, "many"))
    for broken in ({"model_type": "qwen3"}, {"model_type": "unheard_of", **SMALL}, *heads):
        assert from_hf_config(broken, "x") is None


def test_every_broken_rule_of_a_model_is_told_at_once() -> None:
    shape = tables.shapes()["nano3"]
    layout = Layout(4096, tensor=16, pipeline=8, expert=24, expert_tensor=5)
    told = {problem.what: problem.fix for problem in model_problems(shape, layout, "megatron_bridge")}
    assert told == {
        "8 Mamba groups of nano3 can't be split by 16": "parallel.tensor_model_parallel_size=1, 2, 4 or 8",
        "52 layers of nano3 can't be shared out over 8 pipeline stages evenly": (
            "parallel.pipeline_model_parallel_size=1, 2, 4, 13, 26 or 52"
        ),
        "128 experts of nano3 can't be shared out over 24 ranks": (
            "parallel.expert_model_parallel_size=1, 2, 4, 8, 16, 32, 64 or 128"
        ),
        "experts of width 1856 can't be split by 5": (
            "parallel.expert_tensor_parallel_size=1, 2, 4, 8, 16, 29, 32, 58, 64, 116, 232, 464, 928 or 1856"
        ),
    }
    assert [p.what for p in model_problems(shape, Layout(2, tensor=2), "automodel")] == [
        "AutoModel has no tensor parallelism for models with experts"
    ]
    dense = tables.shapes()["r1-qwen3-8b"]
    assert [p.what for p in model_problems(dense, Layout(8, expert=8), "automodel")] == [
        "r1-qwen3-8b has no experts to share out"
    ]
    assert [p.what for p in model_problems(dense, Layout(8, pipeline=8), "megatron_bridge")] == [
        "36 layers of r1-qwen3-8b can't be shared out over 8 pipeline stages evenly"
    ], "a layer of a usual transformer is attention and MLP together"
    virtual = [
        [(p.what, p.fix) for p in model_problems(model, Layout(4, pipeline=4, virtual=number), "megatron_bridge")]
        for model, number in ((dense, 3), (dense, 2), (shape, 13))
    ]
    key = "backend.native.model.virtual_pipeline_model_parallel_size"
    assert virtual == [
        [],
        [("9 layers of a rank can't be shared out over 2 virtual stages evenly", f"{key}=1, 3 or 9")],
        [("Megatron-Core has no virtual pipeline stages for Mamba layers, as nano3 has", "leave it out")],
    ]
    assert tensor_sizes(dense) == [1, 2, 4, 8, 16, 32]
    assert tensor_sizes(replace(dense, heads=12, kv_heads=3, ffn=96)) == [1, 3, 6, 12], "2 ranks would share 1.5 heads"


def test_what_shares_memory_out() -> None:
    shape = tables.shapes()["nano3"]
    alone, spread = (memory(shape, Layout(n, expert=min(n, 8)), BATCH, BRIDGE, None) for n in (1, 16))
    assert alone.weights == 2 * parameters.total(shape)
    assert alone.gradients == 2 * alone.weights and alone.optimizer == 6 * alone.weights
    assert alone.buffers == 0 < spread.buffers
    dense, routed = parameters.total(shape) - 23 * 128 * 2 * 2688 * 1856, 23 * 128 * 2 * 2688 * 1856
    assert spread.optimizer == pytest.approx(12 * (dense / 16 + routed / 8 / 2))
    whole = memory(shape, Layout(16, expert=8), BATCH, replace(BRIDGE, shards_optimizer=False), None)
    assert whole.optimizer == pytest.approx(12 * (dense + routed / 8))
    again = memory(shape, Layout(16, expert=8), BATCH, replace(BRIDGE, recompute=True), None)
    assert again.activations < 0.2 * spread.activations
    compared = memory(shape, Layout(1), BATCH, replace(BRIDGE, copies=2), None)
    assert compared.weights == 2 * alone.weights
    split = memory(shape, Layout(16, tensor=2, expert=8, sequence_parallel=True), BATCH, BRIDGE, None)
    assert split.activations == pytest.approx(spread.activations / 2)
    context = memory(shape, Layout(16, context=2, expert=8), BATCH, BRIDGE, None)
    assert context.activations == pytest.approx(spread.activations / 2)
    assert context.logits == pytest.approx(spread.logits / 2)


def test_adapters_keep_the_base_frozen_and_qlora_makes_it_smaller() -> None:
    shape = tables.shapes()["r1-qwen3-8b"]
    lora = Lora(16, ("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"))
    trained = 36 * 16 * ((4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096))
    adapted = memory(shape, Layout(1), BATCH, BRIDGE, lora)
    assert adapted.weights == 2 * (parameters.total(shape) + trained)
    assert (adapted.gradients, adapted.optimizer) == (4 * trained, 12 * trained)
    small = memory(shape, Layout(1), BATCH, replace(BRIDGE, quantized=True), lora)
    linear = 36 * sum(parameters.layer(shape, letter).split for letter in "*-")
    assert small.weights == pytest.approx(adapted.weights - linear * (2 - NF4_BYTES))
    super3 = tables.shapes()["super3"]
    stays = memory(super3, Layout(1), BATCH, replace(BRIDGE, quantized=True), lora)
    assert stays.weights > 40 * 2 * parameters.layer(super3, "E").routed, "4-bit loaders skip fused experts"


def test_the_fullest_pipeline_stage_is_the_one_that_is_told() -> None:
    shape = tables.shapes()["r1-qwen3-8b"]
    one, two = (memory(shape, Layout(2, pipeline=n), BATCH, BRIDGE, None) for n in (1, 2))
    layers = parameters.total(shape) - 2 * parameters.embedding(shape) - shape.hidden
    assert two.weights == pytest.approx(layers + 2 * parameters.embedding(shape), rel=0.001)
    assert two.activations == pytest.approx(one.activations), "two micro batches of half the layers"


@pytest.mark.parametrize(
    ("gib", "verdict"), [(80, "fits"), (60, "tight"), (59.7, "doubtful"), (58.5, "impossible"), (40, "impossible")]
)
def test_verdicts(gib: float, verdict: str) -> None:
    takes = memory(tables.shapes()["nano3"], Layout(16, expert=8), BATCH, replace(BRIDGE, recompute=True), None)
    assert takes.needed / GIB == pytest.approx(59.85, abs=0.05)
    assert takes.verdict(gib * GIB) == verdict


def test_what_a_backend_shares_out_by_itself_is_not_guessed() -> None:
    model = {"dtype": "bfloat16", "load_in_4bit": False}
    config = {"method": "sft", "model": model, "peft": None, "backend": {"name": "trl", "native": {}}}
    assert footprint(config, 8) is not None
    for name in ("fsdp", "deepspeed"):
        config["backend"] = {"name": "trl", "native": {name: "full_shard"}}
        assert footprint(config, 8) is None
    native = {"optimizer": {"optimizer_cpu_offload": True}}
    config["backend"] = {"name": "megatron_bridge", "native": native}
    whole = footprint(config, 8)
    native["optimizer"] = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": "abc"}
    assert footprint(config, 8) == whole, "the schema refuses it, not the estimate"


def test_gradients_wait_for_the_last_micro_batch_unless_fsdp_shares_them_out_before() -> None:
    """AutoModel on 8 GPUs with EP 8, the layout of NVIDIA's page on sizes: 14.5 GiB more than with one micro batch."""
    shape, layout = tables.shapes()["nano3"], Layout(8, expert=8)
    config: dict[str, Any] = {"method": "sft", "peft": None, "model": {"dtype": "bfloat16"}}
    config["backend"] = {"name": "automodel", "native": {}}
    waiting = footprint(config, 8)
    config["backend"]["native"] = {"distributed": {"defer_fsdp_grad_sync": False}}
    shared = footprint(config, 8)
    assert waiting is not None and shared is not None
    one, several, at_once = (
        memory(shape, layout, Batch(2048, 1, number), print_, None).gradients
        for number, print_ in ((1, waiting), (4, waiting), (4, shared))
    )
    assert one == at_once
    routed = 23 * 128 * 2 * 2688 * 1856
    assert several == pytest.approx(4 * (parameters.total(shape) - routed + routed / 8))
    assert (several - one) / GIB == pytest.approx(14.5, abs=0.1)
    alone = memory(shape, Layout(1), Batch(2048, 1, 4), waiting, None)
    assert alone.gradients == 2 * parameters.total(shape), "one GPU shares nothing out"


def nemo_rl_config(method: str, base: str, **native: Any) -> dict[str, Any]:
    told = {"base": f"examples/configs/{base}", **native}
    config: dict[str, Any] = {"method": method, "peft": None, "model": {"dtype": "bfloat16"}, "run": {}}
    config["backend"] = {"name": "nemo_rl", "image": "nvcr.io/nvidia/nemo-rl:v0.7.0", "native": told}
    return config | {"grpo": {"kl_beta": 0.01}, "data": {"pack_size": None}}


def test_what_nemo_rl_keeps_of_a_policy_and_beside_it() -> None:
    shape = tables.shapes()["super3"]
    dpo = nemo_rl_config("dpo", "dpo.yaml")
    told = footprint(dpo, 8)
    assert told is not None and (told.weight, told.gradient, told.optimizer) == (4, 4, 8)
    assert sequence_of(dpo, None) == 1024
    grpo = nemo_rl_config("grpo", "grpo_math_1B_megatron.yaml")
    told = footprint(grpo, 8)
    assert told is not None and (told.weight, told.gradient, told.optimizer, told.shards_optimizer) == (2, 2, 12, True)
    takes = memory(shape, Layout(64, expert=32), Batch(512, 1, 1), told, None)
    found = "; ".join(policy.notes(grpo, shape, takes, 8))
    assert "512 tokens" in found and "60% of each GPU, 224.8 GiB of it weights" in found
    host = 8 * (2 * takes.weights + takes.gradients + takes.optimizer) / GIB
    assert f"beside that: {host:.0f} GiB" in found
    without = "; ".join(policy.notes(grpo | {"grpo": {"kl_beta": 0.0}}, shape, takes, 8))
    assert f"beside that: {host - 8 * takes.weights / GIB:.0f} GiB" in without, "no penalty, no reference model"
    (problem,) = policy.problems(grpo, shape, 80 * GIB)
    assert "224.8 GiB of each GPU, of which it gets 48.0" in problem.what
    assert problem.fix == "backend.native.policy.generation.vllm_cfg.tensor_parallel_size=8"
    for split in ({"tensor_parallel_size": 8}, {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}):
        wide = nemo_rl_config("grpo", "grpo_math_1B_megatron.yaml", policy={"generation": {"vllm_cfg": split}})
        assert not list(policy.problems(wide, shape, 80 * GIB))
    half = {"generation": {"vllm_cfg": {"tensor_parallel_size": 4, "precision": "fp8"}}}
    assert not list(policy.problems(nemo_rl_config("grpo", "grpo_math_1B_megatron.yaml", policy=half), shape, 80 * GIB))
    elsewhere = {"generation": {"colocated": {"enabled": False}}}
    assert footprint(nemo_rl_config("grpo", "grpo_math_1B_megatron.yaml", policy=elsewhere), 8) is None
