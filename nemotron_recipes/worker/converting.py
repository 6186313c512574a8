"""What conversions share: the checkpoint that they begin from, and whether a Hugging Face folder came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.rundir import TRACKER, latest_checkpoint
from nemotron_recipes.spec import Tree
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.sealing import require_input_unchanged

RUN_CONFIG = "run_config.yaml"  # beside the shards of Megatron's checkpoint: what it was made with


def key_of(name: str) -> str:
    """The config key of checkpoint.path or checkpoint.base."""
    return f"checkpoint.{name}"


def checkpoint_folder(context: Context, name: str) -> Path:
    """The iter_NNNNNNN folder behind checkpoint.path or checkpoint.base. UserError: it isn't whole, or as it was."""
    given = context.inputs[key_of(name)]
    folder = given if given.name.startswith("iter_") else latest_checkpoint(given)
    if folder is None or not folder.is_dir():
        what = f"no whole checkpoint at {given}"
        raise UserError(Problem(what, key_of(name), f"give an iter_NNNNNNN folder, or one that holds {TRACKER}"))
    require_input_unchanged(context, key_of(name), folder)
    return folder


def adapters_of(checkpoint: Path) -> Tree | None:
    """What Megatron's checkpoint says of the adapters in it; None: it holds none."""
    try:
        text = (checkpoint / RUN_CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    said: Tree | None = yaml.load(text, Loader=_Plain).get("peft")
    return said


def require_hf_folder(folder: Path, who: str) -> None:
    """JobFailed: `who` left no config or no weights there."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ""
        raise JobFailed(f"{who} wrote no whole Hugging Face folder, only {found or 'nothing'}")


class _Plain(yaml.SafeLoader):
    """Objects of Python in a run_config.yaml become plain data, nothing is imported or called."""


def _plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)  # type: ignore[arg-type]


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", _plain)
_Plain.add_multi_constructor("!", _plain)
