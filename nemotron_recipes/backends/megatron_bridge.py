"""Backend megatron_bridge: `pretrain` and `finetune` of NVIDIA Megatron-Bridge, from one of its named recipes.

The stage's files are the worker file and megatron.yaml: overrides in the sections of Megatron-Bridge's ConfigContainer,
as its own scripts read them with --config-file. Paths that are known only when the stage runs are added by the worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemotron_recipes.backends import native
from nemotron_recipes.backends.layout import Layout, batch_problems, layout_problems
from nemotron_recipes.backends.schemas import NativeSchema, unknown_recipe
from nemotron_recipes.backends.workerfile import MODULE, file_path, worker_args, worker_file, yaml_text
from nemotron_recipes.errors import Problem, nearest
from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import Launch, StageSpec, Tree

FILE, NATIVE_FILE = "train.yaml", "megatron.yaml"
PRECISION = "mixed_precision."
SCHEMAS = tuple(f"megatron_bridge-{version}" for version in ("0.3.1", "0.4.0", "0.5.0", "0.6.2"))  # oldest first

_TABLE = {
    "train.train_iters": "train.train_iters",
    "train.global_batch_size": "train.global_batch_size",
    "train.micro_batch_size": "train.micro_batch_size",
    "train.seed": "rng.seed",
    "train.log_interval": "logger.log_interval",
    "train.eval_interval": "train.eval_interval",
    "optimizer.name": "optimizer.optimizer",
    "optimizer.lr": "optimizer.lr",
    "optimizer.weight_decay": "optimizer.weight_decay",
    "optimizer.adam_beta1": "optimizer.adam_beta1",
    "optimizer.adam_beta2": "optimizer.adam_beta2",
    "optimizer.adam_eps": "optimizer.adam_eps",
    "optimizer.clip_grad": "optimizer.clip_grad",
    "scheduler.lr_decay_style": "scheduler.lr_decay_style",
    "scheduler.lr_warmup_iters": "scheduler.lr_warmup_iters",
    "checkpoint.save_interval": "checkpoint.save_interval",
    "checkpoint.keep": "checkpoint.most_recent_k",
    "data.pack_size": "model.seq_length",
    "model.dtype": "mixed_precision",
    **{
        f"parallel.{name}": f"model.{name}"
        for name in (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
            *("expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel"),
        )
    },
}
_LORA = {f"peft.{name}": f"peft.{name}" for name in ("dim", "alpha", "dropout", "target_modules")}
# Megatron's linear layers, and what Hugging Face calls their parts.
_TARGETS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("up_proj", "gate_proj"),
    "linear_fc2": ("down_proj",),
    "in_proj": ("in_proj",),
    "out_proj": (),
}
_UNREAD = {
    **native.UNREAD,
    "model.attn_implementation": "backend.native.model.attention_backend, in Megatron's words",
}
# Native keys that the launch decides, and why another value would break a promise.
_OWNED = {
    "checkpoint.save": "everything goes to the run folder",
    "checkpoint.load": "use train.resume or checkpoint.load",
    "checkpoint.ckpt_step": "use checkpoint.load",
    "checkpoint.pretrained_checkpoint": "use checkpoint.pretrained_checkpoint",
    "checkpoint.exit_on_missing_checkpoint": "a missing checkpoint must end the run",
    "checkpoint.finetune": "follows from what is loaded",
    "train.exit_signal_handler": "a signal must save first",
    "train.train_samples": "train.train_iters says how long",
    "train.exit_interval": "train.train_iters says how long",
    "train.exit_duration_in_mins": "the deadline of the job says how long",
    "scheduler.lr_decay_iters": "train.train_iters says how long",
    "dataset.seq_length": "use data.pack_size",
    # Megatron-Bridge copies the section mixed_precision over ddp and optimizer (MixedPrecisionConfig.setup).
    "ddp.grad_reduce_in_fp32": "use backend.native.mixed_precision.grad_reduce_in_fp32, which would win",
    "scheduler.start_weight_decay": "use optimizer.weight_decay",
    "scheduler.end_weight_decay": "use optimizer.weight_decay",
    "logger.tensorboard_dir": "everything goes to the run folder",
    **dict.fromkeys(
        (f"logger.wandb_{name}" for name in ("project", "exp_name", "save_dir", "entity")),
        "[wandb] in env.toml says where to",
    ),
}
# Native sections from which the worker builds another object.
_OWNED_SECTIONS = {
    "dataset.packed_sequence_specs.packed_": "use data.path",
    "dataset.offline_packing_specs.packed_": "use data.path",
}


# What the worker takes of it, by method.
_ALWAYS = ("torch", "yaml", "megatron.core", "megatron.bridge.training.gpt_step:forward_step")
_PACKS = "megatron.bridge.data.packing.config|megatron.bridge.data.datasets.packed_sequence"  # 0.6 on | before
_IMPORTS = {
    "pretrain": (
        *(*_ALWAYS, "megatron.bridge.training.pretrain:pretrain"),
        "megatron.bridge.recipes.utils.dataset_utils:get_blend_fields_from_data_paths",
    ),
    "sft": (*_ALWAYS, "numpy", "megatron.bridge.training.finetune:finetune", _PACKS),
}


class MegatronBridgeBackend:
    """See `Backend`."""

    name = "megatron_bridge"
    kinds = frozenset({"train"})
    methods = frozenset({"pretrain", "sft"})

    def table(self, method: str) -> dict[str, str]:
        return {**_TABLE, **(_LORA if method == "sft" else {})}

    def native_keys(self, method: str) -> frozenset[str]:
        return native.keys(SCHEMAS)

    def unread(self, method: str) -> dict[str, str]:
        return dict(_UNREAD)

    def makes(self, config: Tree) -> str:
        return "checkpoint"

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        layout = Layout.of(config, nproc)
        return [
            *layout_problems(layout),
            *batch_problems(layout, config, packs=config["method"] == "sft"),
            *_needed(config),
            *_lora_problems(config),
            *native.owned_problems(config, _OWNED, _OWNED_SECTIONS),
            *_schema_problems(config),
        ]

    def describe(self, stage: StageSpec) -> Launch:
        config = stage.config
        schema, _ = schema_of(config)
        recipe = config["backend"]["native"]["recipe"]
        module = schema.content["recipes"][recipe]["module"]
        text = worker_file(
            self.name,
            stage,
            method=config["method"],
            recipe={"module": module, "function": recipe},
            config=str(file_path(stage, NATIVE_FILE)),
            pack_size=config["data"]["pack_size"],
            train_iters=config["train"]["train_iters"],
            resume_from=stage.resume_from,
        )
        return Launch(
            module=MODULE,
            args=worker_args(stage, FILE),
            files={FILE: text, NATIVE_FILE: yaml_text(native_tree(stage))},
            launcher="torchrun",
            env={
                "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron orders its communication by it
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            },
            notes=notes(config),
            writes_together=True,
            imports=(*_IMPORTS[config["method"]], f"{module}:{recipe}"),
            versions=native.checked_against(schema),
        )


def schema_of(config: Tree) -> tuple[NativeSchema, str]:
    """What the values are checked against, and a note where that is not the version of the chosen image."""
    return native.schema_for(config, SCHEMAS)


def notes(config: Tree) -> tuple[str, ...]:
    """What people should know that is no problem."""
    return tuple(note for note in (schema_of(config)[1],) if note)


def native_tree(stage: StageSpec) -> Tree:
    """What megatron.yaml holds: sections of the ConfigContainer."""
    config = stage.config
    given = native.flat(config["backend"]["native"], native.keys(SCHEMAS))
    given.pop("recipe", None)
    values = native_values(config)
    if any(key.startswith(PRECISION) for key in given):  # its fields, and the name that they change
        values[f"{PRECISION}recipe"] = values.pop("mixed_precision")
    values |= given
    folder = StageDir(Path(stage.run["dir"]))
    values |= {
        "scheduler.lr_decay_iters": config["train"]["train_iters"],
        "checkpoint.save": str(folder.checkpoints),
        "checkpoint.exit_on_missing_checkpoint": True,
        "checkpoint.ckpt_format": values.get("checkpoint.ckpt_format", "torch_dist"),
        "train.exit_signal_handler": True,
        "logger.tensorboard_dir": str(folder.path / "tensorboard"),
    }
    # Recipes give the scheduler's weight decay a value of its own, which wins over the optimizer's.
    values |= dict.fromkeys(
        ("scheduler.start_weight_decay", "scheduler.end_weight_decay"), config["optimizer"]["weight_decay"]
    )
    return native.nested(values)


def native_values(config: Tree) -> Tree:
    """Dotted native key -> value, for everything that the envelope says."""
    train = config["train"]
    converted = {
        "optimizer.name": "adam",
        "model.dtype": {"bfloat16": "bf16_mixed", "float32": None}[config["model"]["dtype"]],
        # null means once, at the end
        "train.eval_interval": train["eval_interval"] or train["train_iters"],
        "checkpoint.save_interval": config["checkpoint"]["save_interval"] or train["train_iters"],
    }
    table = {**_TABLE, **(_LORA if config["peft"] else {})}
    return native.translate(config, table, converted)


def _needed(config: Tree) -> Iterator[Problem]:
    if "recipe" not in config["backend"]["native"]:
        recipes = ", ".join(schema_of(config)[0].recipes)
        yield Problem("backend.native.recipe must name a recipe of Megatron-Bridge", fix=f"one of {recipes}")
    if config["data"]["pack_size"] is None:
        yield Problem("megatron_bridge must know the pack size before the data", fix="data.pack_size=4096")
    if config["method"] == "sft" and config["checkpoint"]["pretrained_checkpoint"] is None:
        what = "megatron_bridge finetunes a checkpoint in Megatron's format, and none is named"
        yield Problem(what, fix="checkpoint.pretrained_checkpoint=artifact:NAME or a folder")
    yield from native.not_measured(config, "megatron_bridge")


def _lora_problems(config: Tree) -> Iterator[Problem]:
    peft = config["peft"]
    if peft is None:
        return
    if config["method"] != "sft":
        yield Problem("adapters are for sft", "peft", "peft=null")
    if peft["target_parameters"]:
        yield Problem("Megatron's expert weights are modules: linear_fc1, linear_fc2", fix="peft.target_parameters=[]")
    for name in peft["target_modules"]:
        if name.rpartition(".")[2] in _TARGETS or "*" in name:
            continue
        ours = [target for target, parts in _TARGETS.items() if name in parts]
        fix = f"Megatron calls it {ours[0]}" if ours else nearest(name, _TARGETS)
        yield Problem(f"peft.target_modules: Megatron-Bridge has no module '{name}'", fix=fix)


def _schema_problems(config: Tree) -> Iterator[Problem]:
    schema, _ = schema_of(config)
    given = config["backend"]["native"]
    recipe = given.get("recipe")
    if recipe is not None and recipe not in schema.recipes:
        yield unknown_recipe(schema, recipe)
    if config["model"]["dtype"] == "float32" and "mixed_precision" in given:
        what = "model.dtype=float32 has no mixed precision to set"
        yield Problem(what, "backend.native.mixed_precision", "leave it out, or model.dtype=bfloat16")
    yield from native.unknown_keys(schema, given, native.keys(SCHEMAS))
    yield from schema.problems(given)
    yield from _recipe_problems(config, schema, schema.content["recipes"].get(recipe, {}).get("sections"))


def _recipe_problems(config: Tree, schema: NativeSchema, sections: Tree | None) -> Iterator[Problem]:
    """What the named recipe has no place for. sections: its own, where they are known."""
    if sections is None:
        return
    recipe, given = config["backend"]["native"]["recipe"], config["backend"]["native"]
    adapters = config["peft"] is not None
    if not adapters and sections.get("peft"):
        what = f"{recipe} trains adapters, and none are asked for"
        yield Problem(what, "backend.native.recipe", "+peft.dim=32, or a recipe without them")
    for name in sorted({*given, *(("peft",) if adapters else ())} & schema.content["sections"].keys()):
        if name == "dataset" and config["method"] == "sft":  # the worker makes it
            classes = schema.content["classes"].keys() & {"FinetuningDatasetConfig", "GPTSFTDatasetConfig"}
        elif sections.get(name) is None:
            fix = f"a recipe that has one: {', '.join(_with(schema, name))}" if _with(schema, name) else "leave it out"
            where = f"backend.native.{name}" if name in given else name
            yield Problem(f"{recipe} has no section '{name}' to change", where, fix)
            continue
        else:
            classes = {sections[name]["class"]} if isinstance(sections[name], dict) else set()
        known = {key for cls in classes for key in schema.of_class(name, cls)}
        for key in native.flat({name: given[name]}, native.keys(SCHEMAS)) if classes and name in given else ():
            if key in schema.fields and key not in known:
                what = f"{', '.join(sorted(classes))} of {recipe} has no '{key}'"
                yield Problem(what, f"backend.native.{key}", nearest(key, known))


def _with(schema: NativeSchema, section: str) -> list[str]:
    """The recipes that have such a section."""
    recipes = schema.content["recipes"]
    return [name for name in schema.recipes if recipes[name].get("sections", {}).get(section)]
