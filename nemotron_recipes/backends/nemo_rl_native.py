"""What NeMo-RL calls the envelope's keys, and what it finds under its own: tables, values, the example they change.

Nothing is checked here (nemo_rl_rules.py) and nothing launched (nemo_rl.py).
"""

from __future__ import annotations

from typing import Any

from nemotron_recipes.backends import native
from nemotron_recipes.backends.schemas import NativeSchema
from nemotron_recipes.spec import Tree

SCHEMAS = ("nemo_rl-0.7.0",)
BASES = {"dpo": "examples/configs/dpo.yaml", "grpo": "examples/configs/grpo_math_1B_megatron.yaml"}
GYM = "nemo_gym"  # the reward that stands for NeMo-Gym's environments, which `env.nemo_gym` names

_COMMON = {
    "train.global_batch_size": "policy.train_global_batch_size",
    "train.micro_batch_size": "policy.train_micro_batch_size",
    "optimizer.clip_grad": "policy.max_grad_norm",
    "checkpoint.save_interval": "checkpointing.save_period",
    "checkpoint.keep": "checkpointing.keep_top_k",
    "model.dtype": "policy.precision",
}
_LOOP = {"train.train_iters": "max_num_steps", "train.seed": "seed", "train.eval_interval": "val_period"}
_DTENSOR = {
    "optimizer.name": "policy.optimizer.name",
    "optimizer.lr": "policy.optimizer.kwargs.lr",
    "optimizer.weight_decay": "policy.optimizer.kwargs.weight_decay",
    "optimizer.adam_beta1": "policy.optimizer.kwargs.betas.0",
    "optimizer.adam_beta2": "policy.optimizer.kwargs.betas.1",
    "optimizer.adam_eps": "policy.optimizer.kwargs.eps",
    "parallel.tensor_model_parallel_size": "policy.dtensor_cfg.tensor_parallel_size",
    "parallel.context_parallel_size": "policy.dtensor_cfg.context_parallel_size",
    "parallel.expert_model_parallel_size": "policy.dtensor_cfg.expert_parallel_size",
    "parallel.sequence_parallel": "policy.dtensor_cfg.sequence_parallel",
    **{f"peft.{n}": f"policy.dtensor_cfg.lora_cfg.{n}" for n in ("dim", "alpha", "dropout", "target_modules")},
}
_MEGATRON = {
    "optimizer.name": "policy.megatron_cfg.optimizer.optimizer",
    **{
        f"optimizer.{name}": f"policy.megatron_cfg.optimizer.{name}"
        for name in ("lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps")
    },
    "scheduler.lr_decay_style": "policy.megatron_cfg.scheduler.lr_decay_style",
    "scheduler.lr_warmup_iters": "policy.megatron_cfg.scheduler.lr_warmup_iters",
    **{
        f"parallel.{name}": f"policy.megatron_cfg.{name}"
        for name in (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
            *("expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel"),
        )
    },
    **{f"peft.{name}": f"policy.megatron_cfg.peft.{name}" for name in ("dim", "alpha", "dropout", "target_modules")},
}
TABLES = {
    "dpo": {
        **_COMMON,
        **{key: f"dpo.{name}" for key, name in _LOOP.items()},
        **_DTENSOR,
        "dpo.beta": "dpo.reference_policy_kl_penalty",
    },
    "grpo": {
        **_COMMON,
        **{key: f"grpo.{name}" for key, name in _LOOP.items()},
        **_MEGATRON,
        "grpo.num_generations": "grpo.num_generations_per_prompt",
        "grpo.max_completion_length": "policy.generation.max_new_tokens",
        "grpo.temperature": "policy.generation.temperature",
        "grpo.kl_beta": "loss_fn.reference_policy_kl_penalty",
    },
}


def schema_of(config: Tree) -> tuple[NativeSchema, str]:
    """What the values are checked against, and a note where that is not the version of the chosen image."""
    return native.schema_for(config, SCHEMAS)


def base_of(config: Tree) -> str:
    """The example of NeMo-RL that nemo_rl.yaml begins from, below NeMo-RL's folder."""
    return str(config["backend"]["native"].get("base", BASES[config["method"]]))


def setting(config: Tree, key: str) -> Any:
    """What NeMo-RL will find under a native key that the envelope has no name for: the recipe's, else the example's."""
    given = native.flat(config["backend"]["native"], native.keys(SCHEMAS))
    example = schema_of(config)[0].content["recipes"].get(base_of(config), {"values": {}})
    return given.get(key, example["values"].get(key))


def is_gym(config: Tree) -> bool:
    """Whether the rewards are those of NeMo-Gym's environments."""
    return config["method"] == "grpo" and config["grpo"]["rewards"] == [GYM]


def passes_of(config: Tree) -> float | None:
    """Passes over the data that backend.native limits the training to; None: train.train_iters alone does."""
    given = native.flat(config["backend"]["native"], native.keys(SCHEMAS))
    passes: float | None = given.get(f"{config['method']}.max_num_epochs")
    return passes


def native_values(config: Tree) -> Tree:
    """Dotted native key -> value, for everything that the envelope says."""
    train, method = config["train"], config["method"]
    converted = {
        "optimizer.name": "torch.optim.AdamW" if method == "dpo" else "adam",
        # null means once, at the end
        "train.eval_interval": train["eval_interval"] or train["train_iters"],
        "checkpoint.save_interval": config["checkpoint"]["save_interval"] or train["train_iters"],
    }
    return native.translate(config, TABLES[method], converted)


def method_values(config: Tree) -> Tree:
    """What follows from the envelope without being one of its keys."""
    adapters = config["peft"] is not None
    if config["method"] == "dpo":
        return {"policy.dtensor_cfg.lora_cfg.enabled": adapters, "policy.scheduler": _schedule(config)} | (
            {"policy.dtensor_cfg.lora_cfg.match_all_linear": not config["peft"]["target_modules"]} if adapters else {}
        )
    grpo, lr = config["grpo"], config["optimizer"]["lr"]
    values: Tree = {
        "policy.megatron_cfg.peft.enabled": adapters,
        "policy.megatron_cfg.optimizer.min_lr": lr if config["scheduler"]["lr_decay_style"] == "constant" else 0.0,
        "policy.megatron_cfg.scheduler.lr_decay_iters": config["train"]["train_iters"],
        "grpo.num_prompts_per_step": config["train"]["global_batch_size"] // grpo["num_generations"],
    }
    if not is_gym(config):
        values["data.default.env_name"] = grpo["rewards"][0]
    return values


def _schedule(config: Tree) -> list[Tree]:
    """The learning rate over time as PyTorch's schedulers, as NeMo-RL's DTensor policy chains them."""
    iters, warmup = config["train"]["train_iters"], config["scheduler"]["lr_warmup_iters"]
    after = max(1, iters - warmup)
    name, given = {
        "constant": ("ConstantLR", {"factor": 1.0, "total_iters": after}),
        "linear": ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": after}),
        "cosine": ("CosineAnnealingLR", {"T_max": after}),
    }[config["scheduler"]["lr_decay_style"]]
    first = {"start_factor": 1.0 / warmup, "end_factor": 1.0, "total_iters": warmup} if warmup else {}
    chain = [("LinearLR", first)] if warmup else []
    made: list[Tree] = [{"name": f"torch.optim.lr_scheduler.{n}", "kwargs": k} for n, k in [*chain, (name, given)]]
    return [*made, {"milestones": [warmup] if warmup else []}]
