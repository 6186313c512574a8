"""One Megatron-Bridge stage from its inputs to its output, on this rank."""

from __future__ import annotations

import os
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import TRACKER, latest_checkpoint
from nemotron_recipes.spec import Tree
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.event_files import EventMetrics
from nemotron_recipes.worker.guest import CheckpointWatch, Guest, link_tree, step_of
from nemotron_recipes.worker.megatron_bridge.config import Paths, build_config, read_native
from nemotron_recipes.worker.sealing import (
    Sealing,
    given_checkpoint,
    own_newest,
    require_input_unchanged,
    require_unchanged,
)

# Tags of its TensorBoard files (megatron/bridge/training/utils/train_utils.py and eval.py, 0.3 to 0.6) -> ours. Their
# doubles "... vs samples" count samples, not steps.
_TAGS = {
    "lm loss": "loss",
    "learning-rate": "lr",
    "grad-norm": "grad_norm",
    "iteration-time": "seconds_per_step",
    "lm loss validation": "validation_loss",
}
STATE = "latest_train_state.pt"
BASE = "checkpoint.pretrained_checkpoint"


def run(config: Tree, context: Context) -> None:
    """Build the real config, train, and keep the last checkpoint as the output."""
    from megatron.bridge.training.gpt_step import forward_step

    paths = find_paths(config, context)
    method = config["method"]
    overrides = read_native(Path(config["config"]))
    if context.wandb:
        overrides["logger"] = {**overrides.get("logger", {}), **context.wandb.megatron_bridge()}
    native = build_config(config["recipe"], method, config["pack_size"], overrides, paths)
    if method == "pretrain":
        from megatron.bridge.training.pretrain import pretrain as train
    else:
        from megatron.bridge.training.finetune import finetune as train
    context.event("ready", resume_from=str(paths.load) if paths.load else None)
    guest = Guest(context)
    events = Path(overrides["logger"]["tensorboard_dir"])
    with Sealing(context) as sealing:
        with (
            follow(events, config, context, paths) as metrics,
            CheckpointWatch(context, metrics.look, sealing.saw),
            guest,
        ):
            train(native, forward_step)
        if context.is_main:  # on another node the newest checkpoint may not be seen yet
            _conclude(config, context, guest)


def _conclude(config: Tree, context: Context, guest: Guest) -> None:
    newest = latest_checkpoint(context.dir.checkpoints)
    reached = step_of(newest) if newest else 0
    guest.conclude(reached, config["train_iters"])
    if not context.stop_seen:
        assert newest is not None
        write_output(newest, context.output("checkpoint"))
        context.results["step"] = reached
        context.metadata["format"] = "megatron"


def follow(events: Path, config: Tree, context: Context, paths: Paths) -> EventMetrics:
    """Its TensorBoard files. Its last rank writes them, whole before all ranks meet at the end of training."""
    newest = latest_checkpoint(paths.load) if paths.load else None
    start = paths.load_step or (step_of(newest) if newest else 0)
    return EventMetrics(context, events, _TAGS.get, start, config["train_iters"])


def find_paths(config: Tree, context: Context) -> Paths:
    """Where everything lies, on this machine and in this attempt. UserError: a checkpoint that is not there."""
    own = context.dir.checkpoints
    load: Path | None = None
    step: int | None = None
    if context.attempt > 1 and (newest := own_newest(own)) is not None:
        require_unchanged(context, newest)
        if context.is_main:
            _state_of(newest)
        load = own
    elif config["resume_from"]:
        folder = given_checkpoint(config["resume_from"])
        require_input_unchanged(context, "checkpoint.load", folder)
        load, step = _root_of(folder, context, "resume"), step_of(folder)
    tokenizer = context.artifacts.get("model.tokenizer") or context.artifacts["model.path"]
    key = "model.tokenizer" if "model.tokenizer" in context.artifacts else "model.path"
    return Paths(
        data=context.inputs["data.path"],
        tokenizer=str(context.inputs[key]) if key in context.inputs else tokenizer.name,
        pretrained=_root(context),
        load=load,
        load_step=step,
    )


def _root_of(checkpoint: Path, context: Context, name: str) -> Path:
    """A root with this one checkpoint, `name` in the stage's folder. Where no tracker file lies (a copy; a container
    sees this folder alone) Megatron-Bridge looks for no checkpoint, and would start anew without a word
    (training/setup.py). All ranks look when they have joined, which is after rank 0 was here."""
    root = context.dir.path / name
    if context.is_main:
        root.mkdir(parents=True, exist_ok=True)
        link = root / f"iter_{step_of(checkpoint):07d}"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.abspath(checkpoint))
        _state_of(link)
        write_atomic(root / TRACKER, f"{step_of(checkpoint)}\n")
    return root


def _root(context: Context) -> Path | None:
    """The folder with the tracker file of the base weights, of which Megatron-Bridge loads the newest."""
    if (root := context.inputs.get(BASE)) is None:
        return None
    if root.name.startswith("iter_"):
        require_input_unchanged(context, BASE, root)
        return _root_of(root, context, "base")
    newest = latest_checkpoint(root)
    if newest is not None:
        require_input_unchanged(context, BASE, newest)
    elif not any((root / name).is_file() for name in (TRACKER, STATE)):  # it would go on with random weights
        what = f"no whole checkpoint at {root}: it holds neither {TRACKER} nor {STATE}"
        raise UserError(Problem(what, BASE, "give what convert import or a training has made"))
    return root


def _state_of(newest: Path) -> None:
    """What Megatron-Bridge unpickles to learn which checkpoint is the newest is a copy of a file in that one. Let it be
    of the one that the tracker names, which was looked at."""
    ours, theirs = newest / "train_state.pt", newest.parent / STATE
    if ours.is_file() and (not theirs.is_file() or ours.read_bytes() != theirs.read_bytes()):
        write_atomic(theirs, ours.read_bytes())


def write_output(checkpoint: Path, output: Path) -> None:
    """A checkpoint root with this one checkpoint; the tracker comes last."""
    link_tree(checkpoint, output / checkpoint.name)
    state = checkpoint.parent / STATE
    if state.is_file():
        (output / state.name).write_bytes(state.read_bytes())  # a copy: the next save writes it in place
    (output / TRACKER).write_text(f"{step_of(checkpoint)}\n")
