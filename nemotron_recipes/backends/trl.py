"""Backend trl: TRL's trainers on Transformers and PEFT, one process or many.

The envelope's keys become fields of SFTConfig, DPOConfig, KTOConfig or GRPOConfig through one table per method. What
those classes have is read from trl_fields.json, which tools/trl_fields.py writes: nothing heavy is imported here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from nemotron_recipes.backends.workerfile import MODULE, worker_args, worker_file
from nemotron_recipes.errors import Problem, nearest
from nemotron_recipes.spec import Launch, StageSpec, Tree

FILE = "train.yaml"
METHODS = frozenset({"sft", "dpo", "kto", "grpo"})
# worker/trl/rewards.py; a test holds them equal
REWARDS = frozenset({"exact_match", "format", "code_tests", "json_schema", "judges"})
BUILTIN_MODEL = "tiny"
IMPORTS = ("torch", "transformers", "trl", "peft", "accelerate", "safetensors", "numpy", "jinja2", "orjson", "yaml")
NOT_TRL = frozenset({"require_unsloth"})  # native keys of a backend that are no fields of TRL's classes

_COMMON = {
    "train.train_iters": "max_steps",
    "train.global_batch_size": "gradient_accumulation_steps",  # divided by micro batch and processes
    "train.micro_batch_size": "per_device_train_batch_size",
    "train.seed": "seed",
    "train.log_interval": "logging_steps",
    "train.eval_interval": "eval_steps",
    "optimizer.name": "optim",
    "optimizer.lr": "learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.adam_beta1": "adam_beta1",
    "optimizer.adam_beta2": "adam_beta2",
    "optimizer.adam_eps": "adam_epsilon",
    "optimizer.clip_grad": "max_grad_norm",
    "scheduler.lr_decay_style": "lr_scheduler_type",
    "scheduler.lr_warmup_iters": "warmup_steps",
    "checkpoint.save_interval": "save_steps",
    "checkpoint.keep": "save_total_limit",
    "model.dtype": "bf16",
}
_OF_METHOD = {
    "sft": {},
    "dpo": {"dpo.beta": "beta"},
    "kto": {
        "kto.beta": "beta",
        "kto.desirable_weight": "desirable_weight",
        "kto.undesirable_weight": "undesirable_weight",
    },
    "grpo": {
        "grpo.num_generations": "num_generations",
        "grpo.max_completion_length": "max_completion_length",
        "grpo.temperature": "temperature",
        "grpo.kl_beta": "beta",
        "grpo.reward_weights": "reward_weights",
    },
}
# Transformers' "constant" ignores the warm-up.
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
# Native keys that the worker decides, and why another value would break a promise.
_OWNED = {
    "output_dir": "everything goes to the run folder",
    "num_train_epochs": "train.train_iters says how long",
    "warmup_ratio": "scheduler.lr_warmup_iters says how long",
    "resume_from_checkpoint": "use train.resume or checkpoint.load",
    "save_strategy": "use checkpoint.save_interval",
    "save_only_model": "a checkpoint must be resumable",
    "eval_strategy": "use train.eval_interval",
    "logging_strategy": "use train.log_interval",
    "report_to": "metrics.jsonl is the record; only none, or wandb for TRL's own log in the stage's W&B run",
    "disable_tqdm": "the worker writes its own progress",
    "remove_unused_columns": "the worker makes the batches",
    "train_sampling_strategy": "the order of the data follows from train.seed",
    "shuffle_dataset": "the order of the data follows from train.seed",
    "average_tokens_across_devices": "the loss is one mean over the global batch",
    "precompute_ref_log_probs": "the reference model is asked with each batch",
    "push_to_hub": "outputs go to the artifact store",
    "logging_nan_inf_filter": "a loss that isn't a number must be seen",
}
_REPORTERS = ("none", "wandb")
# ... for SFT alone, where data prep has rendered, tokenised and packed already.
_OWNED_BY_DATA_PREP = (
    *("dataset_kwargs", "dataset_num_proc", "dataset_text_field", "packing", "packing_strategy", "eval_packing"),
    *("padding_free", "max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss"),
    *("chat_template_path", "eos_token", "pad_token"),
)


class TrlBackend:
    """See `Backend`."""

    name = "trl"
    kinds = frozenset({"train"})
    methods = METHODS

    def table(self, method: str) -> dict[str, str]:
        return {**_COMMON, **_OF_METHOD[method]}

    def native_keys(self, method: str) -> frozenset[str]:
        return frozenset(self._own(method))

    def _own(self, method: str) -> dict[str, str]:
        """Native key -> type."""
        return {**_fields()["common"], **_fields()[method]}

    def unread(self, method: str) -> dict[str, str]:
        return {}

    def makes(self, config: Tree) -> str:
        return "model"

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        return [
            *_not_mine(config),
            *_batch_problems(config, nproc),
            *(_reward_problems(config["grpo"]) if config["method"] == "grpo" else ()),
            *_model_problems(config),
            *_native(config, self._own(config["method"])),
        ]

    def describe(self, stage: StageSpec) -> Launch:
        config, method = stage.config, stage.config["method"]
        native = config["backend"]["native"]
        text = worker_file(
            "trl",
            stage,
            method=method,
            processes=stage.nproc,
            model={key: config["model"][key] for key in ("dtype", "attn_implementation", "load_in_4bit", "arch")},
            trainer={**native_values(config, stage.nproc), **{k: v for k, v in native.items() if k not in NOT_TRL}},
            pack_size=config["data"]["pack_size"],
            peft=config["peft"] and {**config["peft"], "target_modules": _targets(config["peft"])},
            **({key: config["grpo"][key] for key in ("rewards", "reward_settings")} if method == "grpo" else {}),
            resume_from=stage.resume_from,
            evaluation=config["evaluation"],
            **self._worker_keys(native),
        )
        return Launch(
            module=MODULE,
            args=worker_args(stage, FILE),
            files={FILE: text},
            launcher="torchrun",
            imports=self.imports(config),
            env={
                # More threads than one made the tiny model 4 to 18 times slower; a GPU run needs none either.
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            },
        )

    def imports(self, config: Tree) -> tuple[str, ...]:
        """What the worker needs of its image."""
        return (*IMPORTS, *(("bitsandbytes",) if config["model"]["load_in_4bit"] else ()))

    def _worker_keys(self, native: Tree) -> Tree:
        """Keys of the worker file beside those that both backends of this worker have."""
        return {}


def native_values(config: Tree, nproc: int) -> Tree:
    """The native keyword arguments that a validated config means, on `nproc` processes in all."""
    method, train = config["method"], config["train"]
    converted = {
        "train.global_batch_size": train["global_batch_size"] // (train["micro_batch_size"] * nproc),
        "optimizer.name": "adamw_torch",
        "scheduler.lr_decay_style": _SCHEDULES[config["scheduler"]["lr_decay_style"]],
        "model.dtype": config["model"]["dtype"] == "bfloat16",
        # null means once, at the end
        "train.eval_interval": train["eval_interval"] or train["train_iters"],
        "checkpoint.save_interval": config["checkpoint"]["save_interval"] or train["train_iters"],
    }
    values = {}
    for key, native in {**_COMMON, **_OF_METHOD[method]}.items():
        section, _, name = key.partition(".")
        values[native] = converted[key] if key in converted else config[section][name]
    return values


def _targets(peft: Tree) -> list[str]:
    """PEFT takes the end of a layer's name; `*.q_proj`, as AutoModel writes it, means the same."""
    return [name.removeprefix("*.") for name in peft["target_modules"]]


def _not_mine(config: Tree) -> Iterator[Problem]:
    """Settings of other backends: kept, they would look as if they did something."""
    if config["parallel"] is not None:
        yield Problem("this backend shares out batches alone, not the model", "parallel", "parallel=null")
    if config["checkpoint"]["pretrained_checkpoint"] is not None:
        fix = "checkpoint.pretrained_checkpoint=null; the base model is model.path"
        yield Problem("this backend starts from a Hugging Face folder", "checkpoint.pretrained_checkpoint", fix)


def _batch_problems(config: Tree, nproc: int) -> Iterator[Problem]:
    train, method = config["train"], config["method"]
    whole, micro = train["global_batch_size"], train["micro_batch_size"]
    if whole % (micro * nproc):
        yield Problem(
            f"train.global_batch_size {whole} can't be divided into micro batches of {micro} on {nproc} processes",
            fix=f"make it a multiple of {micro * nproc}, or change train.micro_batch_size",
        )
    if method == "kto" and micro < 2:
        yield Problem(
            "KTO estimates its KL term inside a micro batch: train.micro_batch_size must be 2 or more",
            fix="train.micro_batch_size=2",
        )
    if method == "grpo":
        group = config["grpo"]["num_generations"]
        if whole % group:
            yield Problem(
                f"train.global_batch_size {whole} (completions) is no multiple of grpo.num_generations {group}",
                fix=f"train.global_batch_size={max(group, whole // group * group)}",
            )
        if train["eval_interval"] is not None and micro * nproc % group:
            yield Problem(
                f"validation during GRPO needs train.micro_batch_size x processes ({micro * nproc}) to be a multiple of"
                f" grpo.num_generations {group}",
                fix="train.eval_interval=null",
            )


def _reward_problems(grpo: Tree) -> Iterator[Problem]:
    names, weights, settings = grpo["rewards"], grpo["reward_weights"], grpo["reward_settings"]
    for reward in names:
        if reward not in REWARDS:
            yield Problem(f"unknown reward '{reward}' in grpo.rewards", fix=nearest(reward, REWARDS))
    if weights is not None and len(weights) != len(names):
        what = f"grpo.reward_weights has {len(weights)} weights for {len(names)} rewards"
        yield Problem(what, fix=f"one each: {', '.join(names)}")
    for reward, key in (("format", "format_pattern"), ("judges", "judges")):
        name = f"grpo.reward_settings.{key}"
        if reward in names and settings[key] is None:
            yield Problem(f"the reward '{reward}' needs {name}", fix=f"{name}=...; docs/rewards.md")
        elif reward not in names and settings[key] is not None:
            yield Problem(f"{name} means nothing without the reward '{reward}'", fix=f"{name}=null")
    try:
        re.compile(settings["format_pattern"] or "")
    except re.error as error:
        yield Problem(f"grpo.reward_settings.format_pattern is no regular expression: {error}")


def _model_problems(config: Tree) -> Iterator[Problem]:
    model, peft = config["model"], config["peft"]
    if model["arch"] and model["path"] != BUILTIN_MODEL:
        yield Problem(
            f"model.arch shapes the model that the project makes, but model.path is '{model['path']}'",
            fix=f"model.path={BUILTIN_MODEL}, or leave its shape out: ~model.arch",
        )
    if model["load_in_4bit"] and peft is None:
        fix = "give adapters: peft.dim=16; or model.load_in_4bit=false"
        yield Problem("a base in 4 bits can't be trained itself", "model.load_in_4bit", fix)
    if model["load_in_4bit"] and model["dtype"] != "bfloat16":
        yield Problem("4 bits are computed with, and merged, in bfloat16", "model.load_in_4bit", "model.dtype=bfloat16")
    for key, value in model["arch"].items():
        yield from _type_problems(f"model.arch.{key}", key, value, _fields()["arch"])
    targets = _targets(peft) if peft is not None else []
    for name in targets:
        if "*" in name:
            yield Problem(f"peft.target_modules: '{name}' is a pattern", fix="name layers: q_proj, k_proj, ...")
    if "out_proj" in targets:
        yield Problem(
            "peft.target_modules: Mamba kernels read out_proj's weight directly, an adapter there would be ignored",
            fix="leave out_proj out",
        )


def _native(config: Tree, types: dict[str, str]) -> Iterator[Problem]:
    for key, value in config["backend"]["native"].items():
        if key in _OWNED and not (key == "report_to" and value in _REPORTERS):
            yield Problem(f"backend.native.{key} can't be set: {_OWNED[key]}", fix="leave it out")
        elif config["method"] == "sft" and key in _OWNED_BY_DATA_PREP:
            yield Problem(f"backend.native.{key} can't be set: data prep has done this", fix="leave it out")
        elif key in types:
            yield from _type_problems(f"backend.native.{key}", key, value, types)


def _type_problems(name: str, key: str, value: Any, types: dict[str, str]) -> Iterator[Problem]:
    if key not in types:
        yield Problem(f"unknown key '{name}'", fix=nearest(key, types))
        return
    expected = types[key].split(" | ")
    actual = "None" if value is None else type(value).__name__
    if expected != ["any"] and actual not in expected and not (actual == "int" and "float" in expected):
        yield Problem(f"'{name}' should be {types[key]}, not {value!r}")


@cache
def _fields() -> dict[str, dict[str, str]]:
    return json.loads(Path(__file__).with_name("trl_fields.json").read_text(encoding="utf-8"))
