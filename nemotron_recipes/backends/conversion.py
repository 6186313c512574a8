"""What the backends that convert weights share: what a validated config must say for one, and its launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from nemotron_recipes.backends import layout as shared
from nemotron_recipes.backends.layout import Layout
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


def problems(backend: str, config: Tree, needed: Sequence[str]) -> Iterator[Problem]:
    """needed: the keys of `checkpoint` that this conversion reads. Everything below `native` is true or false."""
    method = config["method"]
    for name, value in config["checkpoint"].items():
        if name in needed and value is None:
            what = f"convert {method} needs {_WHAT[name]}"
            yield Problem(what, fix=f"checkpoint.{name}=artifact:NAME or a folder")
        elif name not in needed and value is not None:
            yield Problem(f"'checkpoint.{name}' means nothing for convert {method}", fix=f"checkpoint.{name}=null")
    if config["model"]["arch"]:
        yield Problem(f"{backend} makes no tiny model", "model.arch", "~model.arch")
    for key, value in config["backend"]["native"].items():
        if not isinstance(value, bool):
            yield Problem(f"'backend.native.{key}' should be bool, not {value!r}")


def layout_problems(config: Tree, nproc: int) -> Iterator[Problem]:
    """Whether `nproc` processes can share out the model as `parallel` says; without it there is one process."""
    if config["parallel"] is None:
        return
    layout = Layout.of(config, nproc)
    if layout.context > 1 or layout.sequence_parallel:
        what = "a conversion has no sequences to share out"
        yield Problem(what, "parallel", "leave out context_parallel_size and sequence_parallel")
        layout = replace(layout, context=1, sequence_parallel=False)
    if nproc > 1 and layout.smallest == 1:
        what = f"each of {nproc} processes would hold the whole model"
        sizes = ("tensor", "pipeline", "expert")
        fix = " or ".join(f"parallel.{size}_model_parallel_size={nproc}" for size in sizes)
        yield Problem(what, "parallel", fix)
    yield from shared.layout_problems(layout)


def launch(backend: str, stage: StageSpec, imports: Sequence[str], **own: Any) -> Launch:
    """A worker whose file says `own`, and the type that the model gets; under torchrun where there are several.

    imports: as `Launch` has them
    """
    text = worker_file(backend, stage, method=stage.config["method"], dtype=stage.config["model"]["dtype"], **own)
    return Launch(
        module=MODULE,
        args=worker_args(stage, FILE),
        files={FILE: text},
        launcher="torchrun" if stage.nproc > 1 else "plain",
        writes_together=stage.nproc > 1,
        env={"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"},
        imports=("torch", "yaml", *imports),
    )
