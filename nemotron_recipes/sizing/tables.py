"""The tables beside this file, and config.json files on this machine: shapes of models, memory of GPUs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.sizing.shape import Shape, from_hf_config
from nemotron_recipes.spec import Artifact, Tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NOT_FIELDS = ("repository", "source", "sources", "published", "unverified")


@cache
def shapes() -> dict[str, Shape]:
    """Name -> shape of the table."""
    return {name: _row(name, row) for name, row in _table("models.toml").items()}


@cache
def published() -> dict[str, dict[str, float]]:
    """Name -> total and active parameters as the publisher states them."""
    return {name: row["published"] for name, row in _table("models.toml").items()}


@cache
def gpus() -> dict[str, float]:
    """Name of a GPU -> its memory in GiB."""
    return {name: float(row["gib"]) for name, row in _table("gpus.toml").items()}


def shape_of(model: Artifact, arch: Tree, environ: Mapping[str, str] = os.environ) -> Shape | None:
    """The shape of a stage's base model: from the table, or from its config.json, where the run will be or in the hub's
    cache on this machine.

    arch: shapes the tiny model that the project makes. None: nobody here knows the shape.
    """
    if model.source == "builtin":
        return from_hf_config({"model_type": "nemotron_h", **_TINY, **arch}, model.name) if arch else None
    if model.source == "hub":
        for name, row in _table("models.toml").items():
            if model.name in row["repository"]:
                return shapes()[name]
        folder = hub_folder(model, environ)
        config = there.document(str(folder / "config.json")) if folder else None
    elif model.source in ("store", "path"):
        config = transport.call(there.document, f"{model.uri}/config.json")
    else:
        return None
    return from_hf_config(config, model.name or model.uri) if config else None


def hub_folder(model: Artifact, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where the Hugging Face cache keeps a repository at its pinned commit; None where it is not pinned.

    https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    if model.revision is None:
        return None
    home = environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    cache_folder = Path(environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    return cache_folder / f"models--{model.name.replace('/', '--')}" / "snapshots" / model.revision


# What NemotronHConfig takes for fields that `model.arch` leaves out (Transformers 5.23); vocab: the tiny tokenizer's.
_TINY: dict[str, Any] = {
    "vocab_size": 292,
    "conv_kernel": 4,
    "tie_word_embeddings": False,
}


def _row(name: str, row: Tree) -> Shape:
    fields = {key: value for key, value in row.items() if key not in _NOT_FIELDS}
    return Shape(
        name=name,
        unverified=frozenset(row.get("unverified", ())),
        sources={"*": row["source"], **row.get("sources", {})},
        **fields,
    )


@cache
def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
