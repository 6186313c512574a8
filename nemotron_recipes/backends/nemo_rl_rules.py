"""What NeMo-RL can't do with a validated config, each with what to set instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemotron_recipes.backends import native
from nemotron_recipes.backends.layout import Layout, layout_problems
from nemotron_recipes.backends.nemo_rl_native import BASES, GYM, base_of, is_gym, schema_of, setting
from nemotron_recipes.backends.schemas import unknown_recipe
from nemotron_recipes.errors import Problem, nearest
from nemotron_recipes.spec import Tree

# Native keys that the launch decides, and why another value would break a promise.
_OWNED = {
    "checkpointing.checkpoint_dir": "everything goes to the run folder",
    "checkpointing.enabled": "a run must be resumable",
    "checkpointing.metric_name": "the newest checkpoints are kept",
    "checkpointing.higher_is_better": "the newest checkpoints are kept",
    "checkpointing.checkpoint_must_save_by": "the deadline of the job says when",
    "logger.log_dir": "everything goes to the run folder",
    "logger.tensorboard_enabled": "metrics.jsonl follows it",
    "logger.wandb_enabled": "[wandb] in env.toml says where to",
    "policy.model_name": "use model.path",
    "policy.tokenizer.name": "use model.tokenizer",
    "policy.dtensor_cfg.enabled": "DPO runs on DTensor, GRPO on Megatron",
    "policy.megatron_cfg.enabled": "DPO runs on DTensor, GRPO on Megatron",
    "policy.dtensor_cfg.lora_cfg.enabled": "use the section peft",
    "policy.megatron_cfg.peft.enabled": "use the section peft",
    "policy.scheduler": "use the section scheduler",
    "cluster.num_nodes": "use run.nodes",
    "cluster.gpus_per_node": "use run.nproc_per_node",
    "grpo.num_prompts_per_step": "global batch / grpo.num_generations",
}
# What NeMo-RL has registered (nemo_rl/environments/utils.py), of those that judge text.
_ENVIRONMENTS = ("math", "math_multi_reward", "code", "code_jaccard", "reward_model", GYM)
_OWNED_SECTIONS = {
    "data.train.": "use data.path",
    "data.validation.": "use data.path",
    "logger.wandb.": "[wandb] in env.toml says where to",
}
_VLLM = "policy.generation.vllm_cfg"
_SHARE, _PIPELINE = f"{_VLLM}.gpu_memory_utilization", f"{_VLLM}.pipeline_parallel_size"
VLLM_TENSOR = f"{_VLLM}.tensor_parallel_size"
LONGEST = "policy.max_total_sequence_length"

_UNREAD = {
    **native.UNREAD,
    "train.log_interval": "leave it out: every step is logged",
    "data.pack_size": "backend.native.policy.max_total_sequence_length; NeMo-RL packs rows itself",
    "model.attn_implementation": "leave it out",
    **dict.fromkeys(
        (
            "grpo.reward_weights",
            *(f"grpo.reward_settings.{n}" for n in ("format_pattern", "code_seconds", "code_memory_mib", "judges")),
        ),
        "backend.native.env, where NeMo-RL sets its environments",
    ),
}


def unread(method: str) -> dict[str, str]:
    """See `Backend`; the sections of other methods are refused whole."""
    return {key: fix for key, fix in _UNREAD.items() if method == "grpo" or not key.startswith("grpo.")}


def problems(config: Tree, layout: Layout) -> Iterator[Problem]:
    """Each of them."""
    yield from layout_problems(layout)
    yield from _batch_problems(layout, config)
    yield from _method_problems(config)
    yield from native.not_measured(config, "nemo_rl")
    yield from native.owned_problems(config, _OWNED, _OWNED_SECTIONS)
    yield from list(_schema_problems(config)) or [*_generation_problems(config), *_length_problems(config)]


def vllm_of(config: Tree) -> tuple[float, float] | None:
    """(share of each GPU that it gets, bytes of a weight on each of them); None: unused, or refused."""
    if not _generates_with_vllm(config) or list(_generation_problems(config)):
        return None
    bytes_ = 1 if setting(config, f"{_VLLM}.precision") == "fp8" else 2
    return setting(config, _SHARE), bytes_ / (setting(config, VLLM_TENSOR) * setting(config, _PIPELINE))


def _batch_problems(layout: Layout, config: Tree) -> Iterator[Problem]:
    train = config["train"]
    whole, step = train["global_batch_size"], train["micro_batch_size"] * (layout.data or layout.world)
    if whole % step:
        what = f"train.global_batch_size {whole} is no multiple of micro batch x data-parallel replicas, {step}"
        yield Problem(what, fix=f"train.global_batch_size={-(-whole // step) * step}")
    if config["method"] == "grpo" and whole % config["grpo"]["num_generations"]:
        group = config["grpo"]["num_generations"]
        what = f"train.global_batch_size {whole} counts completions, and is no multiple of {group} for each prompt"
        yield Problem(what, fix=f"train.global_batch_size={-(-whole // group) * group}")


def _method_problems(config: Tree) -> Iterator[Problem]:
    parallel, peft = config["parallel"] or {}, config["peft"]
    if config["method"] == "dpo":
        for name in ("pipeline_model_parallel_size", "expert_tensor_parallel_size"):
            if parallel.get(name, 1) != 1:
                yield Problem(f"NeMo-RL's DTensor policy has no parallel.{name}", fix=f"parallel.{name}=1")
    else:
        yield from _reward_problems(config["grpo"])
    if peft and peft["target_parameters"]:
        yield Problem("NeMo-RL adapts modules, not parameters", "peft.target_parameters", "peft.target_parameters=[]")
    if config["checkpoint"]["pretrained_checkpoint"] is not None:
        fix = "checkpoint.pretrained_checkpoint=null; the base model is model.path"
        yield Problem("nemo_rl starts from a Hugging Face folder", "checkpoint.pretrained_checkpoint", fix)


def _reward_problems(grpo: Tree) -> Iterator[Problem]:
    names = grpo["rewards"]
    if len(names) != 1:
        what = "NeMo-RL has one environment for the rows of a data set"
        yield Problem(what, "grpo.rewards", f"grpo.rewards=[math], or [{GYM}] for NeMo-Gym's")
    for name in names:
        if name not in _ENVIRONMENTS:
            yield Problem(f"NeMo-RL has no environment '{name}'", "grpo.rewards", nearest(name, _ENVIRONMENTS))


def _generates_with_vllm(config: Tree) -> bool:
    return config["method"] == "grpo" and setting(config, "policy.generation.backend") == "vllm"


def _generation_problems(config: Tree) -> Iterator[Problem]:
    """What vLLM can't begin with."""
    if not _generates_with_vllm(config):
        return
    share = setting(config, _SHARE)
    if type(share) not in (int, float) or not 0 < share <= 1:
        what = f"'backend.native.{_SHARE}' should be more than 0 and at most 1, not {share!r}"
        yield Problem(what, fix="NeMo-RL's own examples have 0.5 to 0.8")
    for key in (VLLM_TENSOR, _PIPELINE):
        if type(parts := setting(config, key)) is not int or parts < 1:
            yield Problem(f"'backend.native.{key}' should be a whole number above 0, not {parts!r}")


def _length_problems(config: Tree) -> Iterator[Problem]:
    """A length that its schema takes for a number, and no sequence has."""
    if (longest := setting(config, LONGEST)) is not None and (type(longest) is not int or longest < 1):
        what = f"'backend.native.{LONGEST}' should be a whole number above 0, not {longest!r}"
        yield Problem(what, fix="tokens of the longest sequence, prompt and completion together")


def _schema_problems(config: Tree) -> Iterator[Problem]:
    schema, _ = schema_of(config)
    given = {key: value for key, value in config["backend"]["native"].items() if key != "base"}
    if base_of(config) not in schema.recipes:
        yield unknown_recipe(schema, base_of(config), "backend.native.base")
    if (config["method"] == "dpo") != ("dpo" in Path(base_of(config)).name):
        yield Problem(
            f"{base_of(config)} is not for {config['method']}", "backend.native.base", BASES[config["method"]]
        )
    if is_gym(config) != ("nemo_gym" in base_of(config)):
        what = f"the rewards of {GYM} and the examples below examples/nemo_gym go together"
        yield Problem(what, "grpo.rewards", "examples/nemo_gym/grpo_nanov3.yaml, or grpo.rewards=[math]")
    yield from schema.problems(given)
