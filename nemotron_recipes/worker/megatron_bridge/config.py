"""From megatron.yaml to Megatron-Bridge's real ConfigContainer. Imports it inside functions; CPU is enough."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.spec import Tree

# Importers of `rope_type: yarn` models (0.4 to 0.6) leave these None, and Megatron-Core multiplies with them.
YARN = {
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}


@dataclass(frozen=True)
class Paths:
    """What is known only where the stage runs."""

    data: Path
    tokenizer: str  # a folder, or the name of a hub repository
    pretrained: Path | None = None  # root of a checkpoint in Megatron's format
    load: Path | None = None  # root of the checkpoint to continue from
    load_step: int | None = None  # null: the newest of `load`


def build_config(recipe: Tree, method: str, pack_size: int, overrides: Tree, paths: Paths) -> Any:
    """The recipe's config with every override applied. UserError: a key that this version does not have."""
    config = _recipe(recipe)()
    overrides = dict(overrides)
    own_data = overrides.pop("dataset", {})
    if isinstance(precision := overrides.get("mixed_precision"), dict):
        overrides["mixed_precision"] = _mixed_precision(precision)
    _set(config, overrides)
    if method == "pretrain":
        _use_pretraining_data(config, paths.data, pack_size)
    else:
        config.dataset = _packed_dataset(config, paths.data, pack_size)
    _set(config.dataset, own_data, "dataset.")
    _use_paths(config, paths)
    repair_yarn(config.model)
    return config


def repair_yarn(model: Any) -> list[str]:
    """Give YARN's fields their usual values where an import left None; returns the names."""
    repaired = [name for name in YARN if getattr(model, name, 0) is None]
    if getattr(model, "position_embedding_type", None) != "yarn":
        return []
    for name in repaired:
        setattr(model, name, YARN[name])
    return repaired


def read_native(path: Path) -> Tree:
    """megatron.yaml, as written by the plan."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _recipe(recipe: Tree) -> Any:
    try:
        module = importlib.import_module(recipe["module"])
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron.bridge.recipes"):
            raise
        raise UserError(Problem(f"this Megatron-Bridge has no {recipe['module']}", fix="use another image")) from None
    found = getattr(module, recipe["function"], None)
    if found is None:
        there = [name for name, value in vars(module).items() if name.endswith("_config") and inspect.isfunction(value)]
        what = f"this Megatron-Bridge has no recipe {recipe['function']}"
        raise UserError(Problem(what, "backend.native.recipe", nearest(recipe["function"], there)))
    return found


def _set(section: Any, values: Tree, prefix: str = "") -> None:
    """Assign to fields alone: Megatron-Bridge's own merge warns about an unknown name and goes on."""
    import torch

    names = {field.name for field in fields(section)}
    for name, value in values.items():
        if name not in names:
            what = f"{type(section).__name__} of this Megatron-Bridge has no field '{prefix}{name}'"
            raise UserError(Problem(what, fix=nearest(name, names)))
        old = getattr(section, name)
        if isinstance(value, dict) and is_dataclass(old):
            _set(old, value, f"{prefix}{name}.")
        elif isinstance(value, dict) and old is None:
            what = f"this recipe has no section '{prefix}{name}' to change"
            raise UserError(Problem(what, fix="choose another recipe: backend.native.recipe"))
        elif isinstance(old, torch.dtype) and isinstance(value, str):
            setattr(section, name, getattr(torch, value.removeprefix("torch.")))
        else:
            setattr(section, name, value)


def _mixed_precision(given: Tree) -> Any:
    """A named recipe of mixed precision with fields of its own."""
    fields = dict(given)
    module = importlib.import_module("megatron.bridge.training.mixed_precision")
    config = module.get_mixed_precision_config(fields.pop("recipe"))
    _set(config, fields, "mixed_precision.")
    return config


def _packed_dataset(config: Any, data: Path, pack_size: int) -> Any:
    """The packs of data prep (data.format=megatron_npy), in the words of the installed version."""
    training = importlib.import_module("megatron.bridge.training.config")
    missing = [name for name in ("training.npy", "validation.npy") if not (data / name).is_file()]
    if missing:
        what = f"{data} holds no {missing[0]}: this data was not prepared for Megatron-Bridge"
        raise UserError(Problem(what, "data.path", "prepare it with data.format=megatron_npy"))
    model = config.model
    context, tensor = model.context_parallel_size, model.tensor_model_parallel_size
    newer = hasattr(training, "GPTSFTDatasetConfig")  # from 0.6 on
    module = "megatron.bridge.data." + ("packing.config" if newer else "datasets.packed_sequence")
    specs = importlib.import_module(module).PackedSequenceSpecs(
        packed_sequence_size=pack_size,
        packed_train_data_path=str(data / "training.npy"),
        packed_val_data_path=str(data / "validation.npy"),
        pad_seq_to_mult=_multiple(context, tensor, model.sequence_parallel),
    )
    given: Tree = {"dataset_root": str(data), "seq_length": pack_size, "dataloader_type": "batch"}
    given |= {"do_validation": True, "do_test": False}
    if newer:
        return training.GPTSFTDatasetConfig(**given, enable_offline_packing=True, offline_packing_specs=specs)
    return training.FinetuningDatasetConfig(**given, packed_sequence_specs=specs)


def _use_pretraining_data(config: Any, data: Path, pack_size: int) -> None:
    """A JSON file {"train": [weight, prefix, ...], "valid": [...], "test": [...]} of Megatron's indexed data; or a
    folder that data prep made, with such a file whose prefixes lie in that folder."""
    utils = importlib.import_module("megatron.bridge.recipes.utils.dataset_utils")
    if data.is_dir():
        blend, per_split, split = utils.get_blend_fields_from_data_paths(**_prepared_paths(data))
    else:
        blend, per_split, split = utils.get_blend_fields_from_data_paths(per_split_data_args_path=str(data))
    config.dataset.blend, config.dataset.blend_per_split, config.dataset.split = blend, per_split, split
    config.dataset.seq_length = pack_size


def _prepared_paths(folder: Path) -> dict[str, list[str]]:
    file = folder / "blend.json"
    if not file.is_file():
        fix = "prepare it with `nemotron FAMILY data prep pretrain`, or give the JSON file of a blend"
        raise UserError(Problem(f"{folder} holds no {file.name}: this is no pretraining data", "data.path", fix))
    lists = json.loads(file.read_text(encoding="utf-8"))
    named = {"train": "train_data_path", "valid": "valid_data_path", "test": "test_data_path"}
    return {
        key: [word if number % 2 == 0 else str(folder / word) for number, word in enumerate(lists[part])]
        for part, key in named.items()
        if lists.get(part)
    }


def _multiple(context: int, tensor: int, sequence_parallel: bool) -> int:
    """To what every sequence in a pack is padded: 2*CP for context, CP*TP for sequence parallelism."""
    import math

    by_context = 2 * context if context > 1 else 1
    by_sequence = context * tensor if sequence_parallel and tensor > 1 else 1
    return math.lcm(by_context, by_sequence)


def _use_paths(config: Any, paths: Paths) -> None:
    config.tokenizer.tokenizer_model = paths.tokenizer
    checkpoint = config.checkpoint
    checkpoint.pretrained_checkpoint = str(paths.pretrained) if paths.pretrained else None
    # Recipes set load and save to one default folder, so that a rerun would continue without a word.
    checkpoint.load = str(paths.load) if paths.load else None
    checkpoint.ckpt_step = paths.load_step
