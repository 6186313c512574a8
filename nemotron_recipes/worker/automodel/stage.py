"""One AutoModel stage from its inputs to its output, on this rank."""

from __future__ import annotations

import importlib.util
import runpy
import sys
import time
from pathlib import Path

from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.spec import Tree
from nemotron_recipes.worker.automodel.checkpoints import (
    adopt,
    clear_unfinished,
    model_folder,
    named,
    steps_of,
    to_resume,
)
from nemotron_recipes.worker.automodel.metrics import Metrics
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.guest import CheckpointWatch, Guest, link_tree, step_of
from nemotron_recipes.worker.hub import folder_of
from nemotron_recipes.worker.sealing import Sealing, require_unchanged

# Its command line, and the module that earlier versions were started by.
ENTRIES = ("nemo_automodel.cli.app", "nemo_automodel.recipes.llm.train_ft")


def run(config: Tree, context: Context) -> None:
    """Let AutoModel's own entry point train from automodel.yaml, and keep the last checkpoint as the output."""
    root = context.dir.checkpoints
    resume = to_resume(config["resume_from"], root, context.attempt)
    if resume is not None:
        require_unchanged(context, named(resume))
    if context.is_main:
        root.mkdir(parents=True, exist_ok=True)
        adopt(root, config["keep"])  # what an attempt saved right before it was killed
        clear_unfinished(root)
    argv = arguments(config, context, resume)
    module = entry()
    context.event("ready", resume_from=str(resume) if resume else None)
    guest = Guest(context)
    metrics = Metrics(context, steps_of(resume), config["train_iters"]) if context.is_main else None

    def look() -> None:
        adopt(root, config["keep"])
        if metrics:
            metrics.look()

    with Sealing(context) as sealing:
        with CheckpointWatch(context, look, sealing.saw), guest:
            _start(module, argv)
        if context.is_main:
            _conclude(adopt(root, config["keep"]), config, context, guest)


def _conclude(newest: Path | None, config: Tree, context: Context, guest: Guest) -> None:
    reached = step_of(newest) if newest else 0
    guest.conclude(reached, config["train_iters"])
    if not context.stop_seen:
        assert newest is not None
        write_output(newest, config["adapters"], context)
        context.results["step"] = reached


def arguments(config: Tree, context: Context, resume: Path | None) -> list[str]:
    """The command line after the program's name: the Plan's file, and what is known only here."""
    values: dict[str, object] = {}
    model = context.artifacts["model.path"]
    values["model.pretrained_model_name_or_path"] = context.inputs.get("model.path") or model.name
    if model.source == "hub":
        values["model.revision"] = model.revision
    if resume is not None:
        values["checkpoint.restore_from"] = resume
    if context.wandb:
        values |= {f"wandb.{key}": value for key, value in context.wandb.automodel().items()}
    data = folder_of(context, "data.path")
    for key in config["data_keys"]:
        values[key] = data
        if key.endswith(".path"):  # our packs
            values[key.replace(".path", ".pack_size")] = config["pack_size"]
    return [config["config"], *(f"--{key}={value}" for key, value in values.items())]


def entry() -> str:
    """The module to start. UserError: this AutoModel has neither."""
    importlib.import_module("nemo_automodel")
    for name in ENTRIES:
        if importlib.util.find_spec(name) is not None:
            return name
    raise UserError(Problem(f"this NeMo AutoModel has none of {', '.join(ENTRIES)}", fix="use another image"))


def write_output(checkpoint: Path, adapters: bool, context: Context) -> None:
    """The Hugging Face folder of the last checkpoint. JobFailed: AutoModel wrote none."""
    folder = model_folder(checkpoint, adapters)
    name = "adapter_config.json" if adapters else "config.json"
    if not (folder / name).is_file():
        raise JobFailed(f"AutoModel's last checkpoint holds no {name}: {folder}")
    slot = "adapter" if adapters else "model"
    link_tree(folder, context.output(slot))
    if adapters:
        base = context.artifacts["model.path"]
        context.metadata["base_model"] = base.label


def _start(module: str, argv: list[str]) -> None:
    """As `python -m module ARGV` would, in this process: torchrun has made it one rank of many already."""
    old = sys.argv
    sys.argv = [module, *argv] if module == ENTRIES[0] else [module, "--config", *argv]
    began = time.monotonic()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    finally:
        sys.argv = old
        print(f"{module} ended after {time.monotonic() - began:.0f} s", flush=True)
