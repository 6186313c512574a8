"""Backend automodel: NVIDIA NeMo AutoModel, any Hugging Face causal LM with its layers as they are, on FSDP2.

The stage's files are the worker file and automodel.yaml, which AutoModel's own command line reads as it is. Paths that
are known only when the stage runs are given to it as `--key=value`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemotron_recipes.backends import native
from nemotron_recipes.backends.layout import Layout, batch_problems, layout_problems
from nemotron_recipes.backends.schemas import NativeSchema, targets
from nemotron_recipes.backends.workerfile import MODULE, file_path, worker_args, worker_file, yaml_text
from nemotron_recipes.errors import Problem
from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import Launch, StageSpec, Tree

FILE, NATIVE_FILE = "train.yaml", "automodel.yaml"
SCHEMAS = ("automodel-0.5.0",)
DATA = "data.path"  # in a data set of the recipe's own: the folder behind that key goes here
PACKS = "nemotron_recipes.worker.automodel.packs"

_TABLE = {
    "train.train_iters": "step_scheduler.max_steps",
    "train.global_batch_size": "step_scheduler.global_batch_size",
    "train.micro_batch_size": "step_scheduler.local_batch_size",
    "train.seed": "seed",
    "train.log_interval": "step_scheduler.log_remote_every_steps",
    "train.eval_interval": "step_scheduler.val_every_steps",
    "optimizer.name": "optimizer._target_",
    "optimizer.lr": "optimizer.lr",
    "optimizer.weight_decay": "optimizer.weight_decay",
    "optimizer.adam_beta1": "optimizer.betas.0",
    "optimizer.adam_beta2": "optimizer.betas.1",
    "optimizer.adam_eps": "optimizer.eps",
    "optimizer.clip_grad": "clip_grad_norm.max_norm",
    "scheduler.lr_decay_style": "lr_scheduler.lr_decay_style",
    "scheduler.lr_warmup_iters": "lr_scheduler.lr_warmup_steps",
    "checkpoint.save_interval": "step_scheduler.ckpt_every_steps",
    "model.dtype": "model.torch_dtype",
    "parallel.tensor_model_parallel_size": "distributed.tp_size",
    "parallel.pipeline_model_parallel_size": "distributed.pp_size",
    "parallel.context_parallel_size": "distributed.cp_size",
    "parallel.expert_model_parallel_size": "distributed.ep_size",
    "parallel.sequence_parallel": "distributed.sequence_parallel",
    "peft.dim": "peft.dim",
    "peft.alpha": "peft.alpha",
    "peft.dropout": "peft.dropout",
    "peft.target_modules": "peft.target_modules",
}
_OPTIMIZER = ("_target_", "lr", "weight_decay", "betas", "eps")  # of the open section; the table has these
_UNREAD = {
    **native.UNREAD,
    "model.attn_implementation": "backend.native.model.attn_implementation; without it AutoModel chooses",
    "model.tokenizer": "leave it out: packs hold tokens; another data set has backend.native.dataset.tokenizer",
}
# Native keys that the launch decides, and why another value would break a promise.
_OWNED = {
    "recipe": "the method says which",
    "checkpoint.checkpoint_dir": "everything goes to the run folder",
    "checkpoint.restore_from": "use train.resume or checkpoint.load",
    "checkpoint.enabled": "a run must be resumable",
    "checkpoint.model_save_format": "the output is a Hugging Face folder",
    "checkpoint.save_consolidated": "the output is a Hugging Face folder",
    "checkpoint.is_async": "the newest checkpoint must be whole when the run ends",
    "step_scheduler.num_epochs": "train.train_iters says how long",
    "step_scheduler.start_step": "use train.resume or checkpoint.load",
    "step_scheduler.start_epoch": "use train.resume or checkpoint.load",
    "step_scheduler.save_checkpoint_every_epoch": "use checkpoint.save_interval",
    "model.pretrained_model_name_or_path": "use model.path",
    "distributed.strategy": "layouts are those of FSDP2",
    "wandb": "[wandb] in env.toml says where to",
}
# Its entry point, which has moved (worker/automodel/stage.py), the recipe behind it, and what our packs are read with.
_RECIPE = "nemo_automodel.recipes.llm.train_ft"
IMPORTS = ("torch", "yaml", "numpy", f"nemo_automodel.cli.app|{_RECIPE}", _RECIPE)
_IMPLIED = {  # what a section is where it names no _target_: recipes/_dist_utils.py
    "model.backend": "nemo_automodel.components.models.common.BackendConfig",
    "distributed.mp_policy": "torch.distributed.fsdp.MixedPrecisionPolicy",
    "distributed.moe.mp_policy": "torch.distributed.fsdp.MixedPrecisionPolicy",
    "distributed.offload_policy": "torch.distributed.fsdp.CPUOffloadPolicy",
}
_EPOCHS = 1_000_000  # train.train_iters ends the training, not the number of passes over the data


class AutoModelBackend:
    """See `Backend`."""

    name = "automodel"
    kinds = frozenset({"train"})
    methods = frozenset({"sft"})

    def table(self, method: str) -> dict[str, str]:
        return dict(_TABLE)

    def native_keys(self, method: str) -> frozenset[str]:
        named = {native for native in _TABLE.values() if native.startswith(("optimizer.", "model."))}
        return native.keys(SCHEMAS) | named

    def unread(self, method: str) -> dict[str, str]:
        return dict(_UNREAD)

    def makes(self, config: Tree) -> str:
        return "model" if config["peft"] is None else "adapter"

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        layout = Layout.of(config, nproc)
        return [
            *layout_problems(layout),
            *batch_problems(layout, config),
            *_shape_problems(layout, config),
            *_data_problems(config),
            *native.not_measured(config, self.name),
            *native.owned_problems(config, _OWNED, {}),
            *_native_problems(config),
        ]

    def describe(self, stage: StageSpec) -> Launch:
        config = stage.config
        text = worker_file(
            self.name,
            stage,
            method=config["method"],
            config=str(file_path(stage, NATIVE_FILE)),
            pack_size=config["data"]["pack_size"],
            train_iters=config["train"]["train_iters"],
            keep=config["checkpoint"]["keep"],
            adapters=config["peft"] is not None,
            data_keys=data_keys(config),
            resume_from=stage.resume_from,
        )
        tree = native_tree(stage)
        return Launch(
            module=MODULE,
            args=worker_args(stage, FILE),
            files={FILE: text, NATIVE_FILE: yaml_text(tree)},
            launcher="torchrun",
            env={"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"},
            notes=notes(config),
            writes_together=True,
            imports=(*IMPORTS, *dict.fromkeys(_targets(tree))),
            versions=native.checked_against(schema_of(config)[0]),
        )


def schema_of(config: Tree) -> tuple[NativeSchema, str]:
    """What the values are checked against, and a note where that is not the version of the chosen image."""
    return native.schema_for(config, SCHEMAS)


def notes(config: Tree) -> tuple[str, ...]:
    """What people should know that is no problem."""
    schema, version = schema_of(config)
    passed_on = targets.unchecked(schema, config["backend"]["native"], _tree(config))
    return tuple(note for note in (version, *passed_on) if note)


def native_tree(stage: StageSpec) -> Tree:
    """What automodel.yaml holds."""
    fixed = {
        "checkpoint": {
            "enabled": True,
            "checkpoint_dir": str(StageDir(Path(stage.run["dir"])).checkpoints),
            "model_save_format": "safetensors",
            "save_consolidated": "final",
        },
        "step_scheduler": {"num_epochs": _EPOCHS, "save_checkpoint_every_epoch": False},
    }
    return _merged(_tree(stage.config), fixed)


def _tree(config: Tree) -> Tree:
    """What follows from the config alone."""
    given = config["backend"]["native"]
    own_data = "dataset" in given
    tree: Tree = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "dist_env": {"backend": "nccl", "timeout_minutes": 30},
        "model": {"_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"},
        "distributed": {"strategy": "fsdp2", "dp_size": None},
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
    }
    if not own_data:
        collate = "nemo_automodel.components.datasets.utils.packed_sequence_thd_collater"
        for prefix, split in (("", "train"), ("validation_", "validation")):
            tree[f"{prefix}dataset"] = {"_target_": f"{PACKS}.PackedTensors", "split": split}
            tree[f"{prefix}dataloader"] = {
                "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
                "collate_fn": collate,
                "shuffle": not prefix,
            }
        tree["packed_sequence"] = {"packed_sequence_size": 0}  # data prep has packed already
    if config["peft"]:
        tree["peft"] = {"_target_": "nemo_automodel.components._peft.lora.PeftConfig"}
    tree = _merged(tree, native.nested(native_values(config)))
    return _merged(tree, given)


def data_keys(config: Tree) -> list[str]:
    """Native keys that name the data: of the recipe's own data sets, those that say `data.path`; else of our packs."""
    given = config["backend"]["native"]
    sections = ("dataset", "validation_dataset")
    if "dataset" not in given:
        return [f"{section}.path" for section in sections]
    return [f"{name}.{key}" for name in sections for key, value in given.get(name, {}).items() if value == DATA]


def native_values(config: Tree) -> Tree:
    """Dotted native key -> value, for everything that the envelope says."""
    train = config["train"]
    converted = {
        "optimizer.name": "torch.optim.AdamW",
        # null means once, at the end
        "train.eval_interval": train["eval_interval"] or train["train_iters"],
        "checkpoint.save_interval": config["checkpoint"]["save_interval"] or train["train_iters"],
    }
    return native.translate(config, _TABLE, converted)


def _targets(tree: Tree) -> Iterator[str]:
    """Every class and function that automodel.yaml names of others, as `Launch.imports` has them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _targets(value)
        elif key in ("_target_", "collate_fn") and isinstance(value, str) and not value.startswith(PACKS):
            *parts, last = value.split(".")
            inside = next((number for number, part in enumerate(parts) if part != part.lower()), len(parts))
            yield f"{'.'.join(parts[:inside])}:{'.'.join([*parts[inside:], last])}"


def _merged(below: Tree, above: Tree) -> Tree:
    """`above` wins, section by section; another `_target_` starts its section anew."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        anew = isinstance(value, dict) and "_target_" in value
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) and not anew else value
    return merged


def _shape_problems(layout: Layout, config: Tree) -> Iterator[Problem]:
    if layout.pipeline > 1 and "pipeline" not in config["backend"]["native"].get("distributed", {}):
        what = "AutoModel asks how batches go through a pipeline"
        fix = "'+backend.native.distributed.pipeline={pp_schedule: 1f1b, pp_microbatch_size: 1}'"
        yield Problem(what, "parallel.pipeline_model_parallel_size", fix)
    if layout.expert_tensor != 1:
        what = "AutoModel shares out whole experts only"
        yield Problem(what, fix="parallel.expert_tensor_parallel_size=1")


def _data_problems(config: Tree) -> Iterator[Problem]:
    own = "dataset" in config["backend"]["native"]
    if own and "_target_" not in config["backend"]["native"]["dataset"]:
        yield Problem("backend.native.dataset names no _target_", fix="a data set class of AutoModel, or leave it out")
    if own and not any(key.startswith("dataset.") for key in data_keys(config)):
        fix = f"backend.native.dataset.path_or_dataset={DATA}, or what else its _target_ calls it"
        yield Problem("backend.native.dataset does not say where data.path goes", fix=fix)
    if config["checkpoint"]["pretrained_checkpoint"] is not None:
        fix = "checkpoint.pretrained_checkpoint=null; the base model is model.path"
        yield Problem("automodel starts from a Hugging Face folder", "checkpoint.pretrained_checkpoint", fix)
    if config["peft"] and config["peft"]["target_parameters"]:
        what = "AutoModel adapts modules, and finds the experts' by itself"
        yield Problem(what, "peft.target_parameters", "peft.target_parameters=[]")


def _native_problems(config: Tree) -> Iterator[Problem]:
    given, schema = config["backend"]["native"], schema_of(config)[0]
    for key in given.get("optimizer", {}):
        if key in _OPTIMIZER:
            yield Problem(f"backend.native.optimizer.{key} can't be set", fix="use the section optimizer")
    yield from schema.problems(given)
    yield from targets.problems(schema, given, _tree(config), implied=_IMPLIED)
