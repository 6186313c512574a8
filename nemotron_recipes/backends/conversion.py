"""What the backends that convert weights share: what a validated config must say for one, and its launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nemotron_recipes.backends.workerfile import MODULE, worker_args, worker_file
from nemotron_recipes.errors import Problem
from nemotron_recipes.spec import Launch, StageSpec, Tree

FILE = "convert.yaml"
_WHAT = {"path": "the checkpoint to convert", "base": "the checkpoint that the adapters were trained on"}

UNREAD = {
    "model.attn_implementation": "leave it out: nothing is computed with the model",
    "model.load_in_4bit": "leave it out: weights are converted as they are",
    "model.tokenizer": "leave it out: the model's own goes with it",
}


def problems(backend: str, config: Tree, nproc: int, needed: Sequence[str]) -> Iterator[Problem]:
    """needed: the keys of `checkpoint` that this conversion reads. Everything below `native` is true or false."""
    method = config["method"]
    for name, value in config["checkpoint"].items():
        if name in needed and value is None:
            what = f"convert {method} needs {_WHAT[name]}"
            yield Problem(what, fix=f"checkpoint.{name}=artifact:NAME or a folder")
        elif name not in needed and value is not None:
            yield Problem(f"'checkpoint.{name}' means nothing for convert {method}", fix=f"checkpoint.{name}=null")
    if nproc != 1:
        yield Problem(f"a conversion is one process, not {nproc}", fix="run.nproc_per_node=1")
    if config["model"]["arch"]:
        yield Problem(f"{backend} makes no tiny model", "model.arch", "~model.arch")
    for key, value in config["backend"]["native"].items():
        if not isinstance(value, bool):
            yield Problem(f"'backend.native.{key}' should be bool, not {value!r}")


def launch(backend: str, stage: StageSpec, imports: Sequence[str], **own: Any) -> Launch:
    """One process whose worker file says `own`, and the type that the model gets; imports: as `Launch` has them."""
    text = worker_file(backend, stage, method=stage.config["method"], dtype=stage.config["model"]["dtype"], **own)
    return Launch(
        module=MODULE,
        args=worker_args(stage, FILE),
        files={FILE: text},
        launcher="plain",
        env={"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"},
        imports=("torch", "yaml", *imports),
    )
