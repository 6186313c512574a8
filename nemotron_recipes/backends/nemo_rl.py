"""Backend nemo_rl: DPO and GRPO of NVIDIA NeMo-RL, DPO on DTensor and GRPO on Megatron, both with Ray.

The stage's files are the worker file and nemo_rl.yaml: what differs from one of NeMo-RL's own examples
(`backend.native.base`), from which NeMo-RL's loader begins. The worker starts Ray on the nodes that the launcher gives
it, and there NeMo-RL's program; paths that are known only when the stage runs are added by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotron_recipes.backends import native, ray_nodes
from nemotron_recipes.backends.layout import Layout, layout_problems
from nemotron_recipes.backends.schemas import NativeSchema, unknown_recipe
from nemotron_recipes.backends.workerfile import MODULE, file_path, worker_args, worker_file, yaml_text
from nemotron_recipes.errors import Problem, nearest
from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import Launch, StageSpec, Tree

FILE, NATIVE_FILE = "train.yaml", "nemo_rl.yaml"
SCHEMAS = ("nemo_rl-0.7.0",)
BASES = {"dpo": "examples/configs/dpo.yaml", "grpo": "examples/configs/grpo_math_1B_megatron.yaml"}
GYM = "nemo_gym"  # the reward that stands for NeMo-Gym's environments, which `env.nemo_gym` names
SCRIPTS = {"dpo": "examples/run_dpo.py", "grpo": "examples/run_grpo.py", GYM: "examples/nemo_gym/run_grpo_nemo_gym.py"}

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
_TABLES = {
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
_EPOCHS = 1_000_000  # train.train_iters ends the training, unless backend.native gives a number of passes, too


class NemoRlBackend:
    """See `Backend`."""

    name = "nemo_rl"
    kinds = frozenset({"train"})
    methods = frozenset(_TABLES)

    def table(self, method: str) -> dict[str, str]:
        return dict(_TABLES[method])

    def native_keys(self, method: str) -> frozenset[str]:
        return native.keys(SCHEMAS) | frozenset(_TABLES[method].values()) | {"base"}

    def makes(self, config: Tree) -> str:
        return "checkpoint"

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        layout = Layout.of(config, nproc)
        return [
            *layout_problems(layout),
            *_batch_problems(layout, config),
            *_method_problems(config),
            *native.not_measured(config, self.name, but=config["method"]),
            *native.owned_problems(config, _OWNED, _OWNED_SECTIONS),
            *(list(_schema_problems(config)) or _generation_problems(config)),
        ]

    def describe(self, stage: StageSpec) -> Launch:
        config = stage.config
        text = worker_file(
            self.name,
            stage,
            method=config["method"],
            script=SCRIPTS[GYM if is_gym(config) else config["method"]],
            base=base_of(config),
            config=str(file_path(stage, NATIVE_FILE)),
            gym=is_gym(config),
            train_iters=config["train"]["train_iters"],
            keep=config["checkpoint"]["keep"],
            ray=ray_nodes.nodes(config["run"].get("nodes", 1)),
            passes=passes_of(config),
            resume_from=stage.resume_from,
        )
        return Launch(
            module=MODULE,
            args=worker_args(stage, FILE),
            files={FILE: text, NATIVE_FILE: yaml_text(native_tree(stage))},
            launcher="torchrun",
            env={"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", **ray_nodes.ENVIRONMENT},
            notes=tuple(note for note in (schema_of(config)[1],) if note),
            writes_together=True,
        )


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


def vllm_of(config: Tree) -> tuple[float, float] | None:
    """(share of each GPU that it gets, bytes of a weight on each of them); None: unused, or refused."""
    if not _generates_with_vllm(config) or list(_generation_problems(config)):
        return None
    bytes_ = 1 if setting(config, f"{_VLLM}.precision") == "fp8" else 2
    return setting(config, _SHARE), bytes_ / (setting(config, VLLM_TENSOR) * setting(config, _PIPELINE))


def is_gym(config: Tree) -> bool:
    """Whether the rewards are those of NeMo-Gym's environments."""
    return config["method"] == "grpo" and config["grpo"]["rewards"] == [GYM]


def native_tree(stage: StageSpec) -> Tree:
    """What nemo_rl.yaml holds."""
    config, run = stage.config, stage.config["run"]
    folder, method = StageDir(Path(stage.run["dir"])), config["method"]
    given = native.flat(config["backend"]["native"], native.keys(SCHEMAS))
    given.pop("base", None)
    nodes = run.get("nodes", 1)
    values = {
        **_method_values(config),
        **native_values(config),
        f"{method}.max_num_epochs": _EPOCHS,
        **given,
        "policy.dtensor_cfg.enabled": method == "dpo",
        "policy.megatron_cfg.enabled": method == "grpo",
        "checkpointing.enabled": True,
        "checkpointing.checkpoint_dir": str(folder.checkpoints),
        "checkpointing.metric_name": None,
        "logger.log_dir": str(folder.path / "nemo_rl"),
        "logger.tensorboard_enabled": True,
        # The mirror sends metrics.jsonl. NeMo-RL would wait for W&B, and upload the sources and diffs of its folder.
        "logger.wandb_enabled": False,
        "cluster.num_nodes": nodes,
        "cluster.gpus_per_node": stage.nproc // nodes,
    }
    return native.nested(values)


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
    return native.translate(config, _TABLES[method], converted)


def _method_values(config: Tree) -> Tree:
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
    settings = grpo["reward_settings"]
    unread = {"reward_weights": grpo["reward_weights"]}
    unread |= {f"reward_settings.{key}": settings[key] for key in ("format_pattern", "judges")}
    for key, value in unread.items():
        if value is not None:
            fix = "backend.native.env, where NeMo-RL sets its environments"
            yield Problem(f"NeMo-RL does not read grpo.{key}", f"grpo.{key}", fix)


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
