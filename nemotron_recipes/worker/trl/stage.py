"""One training stage from its inputs to its output, on this rank."""

from __future__ import annotations

import os
import time
import warnings
from functools import partial
from typing import Any

from torch import distributed
from transformers.utils import logging

from nemotron_recipes.rundir import read_jsonl
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.deadline import Pace, deadline_from, last_save_seconds
from nemotron_recipes.worker.sealing import require_unchanged
from nemotron_recipes.worker.trl import fourbit
from nemotron_recipes.worker.trl.callbacks import Progress, SaveWhole, StopWhenAsked, WhereItIs
from nemotron_recipes.worker.trl.checkpoints import checkpoint_to_resume, quarantine, staging_folder
from nemotron_recipes.worker.trl.config import TrlSettings
from nemotron_recipes.worker.trl.data import DataFolder
from nemotron_recipes.worker.trl.engine import Engine
from nemotron_recipes.worker.trl.evaluate import exact_match, label_accuracy, preference_accuracy
from nemotron_recipes.worker.trl.learning import LeavesLn2, require_targets
from nemotron_recipes.worker.trl.models import base_folders, load_tokenizer, load_weights
from nemotron_recipes.worker.trl.output import write_output
from nemotron_recipes.worker.trl.rewards import final_answer
from nemotron_recipes.worker.trl.sandbox import walls
from nemotron_recipes.worker.trl.trainers import build_trainer


def run_stage(settings: TrlSettings, context: Context, engine: Engine) -> None:
    """Load, measure, train, measure again, write the model."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # TRL itself uses Transformers' old names for activation checkpointing.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    context.event("engine", words=engine.words)
    if context.is_main:
        context.facts["trained_with"] = context.metadata["trained_with"] = engine.words
        print(f"training with {engine.words}", flush=True)
        if settings.method == "grpo" and "code_tests" in settings.rewards:
            context.facts["code_sandbox"] = walls()
            print(context.facts["code_sandbox"], flush=True)
    adapters = settings.peft is not None
    if context.is_main:
        for folder in quarantine(context.dir.checkpoints, adapters):
            print(f"warning: this checkpoint is not whole, and nothing goes on from it: moved to {folder}", flush=True)
            context.event("checkpoint-quarantined", checkpoint=str(folder))
    resume = checkpoint_to_resume(settings.resume_from, context.dir.checkpoints, context.attempt, adapters)
    if resume is not None:
        require_unchanged(context, resume)
    context.expendable.append(staging_folder(context.dir.checkpoints))
    with base_folders(settings, context) as base:
        data = DataFolder(context.inputs["data.path"], settings.method, base.tokenizer, settings.pack_size)
        model = engine.load(base.model, settings, partial(data.longest, settings))
        if settings.model.load_in_4bit:
            _say_split(fourbit.found(model), context)
        if settings.peft is not None:
            require_targets(model, settings.peft)
        model = engine.adapted(model, settings)
        tokenizer = load_tokenizer(base.tokenizer, data.template)
        trainer = build_trainer(settings, context, model, tokenizer, data)
        trainer.add_callback(Progress(context, start=_step_of(resume)))
        pace = Pace(deadline_from(os.environ), last_save_seconds(context.dir, context.attempt))
        trainer.add_callback(StopWhenAsked(context, pace))
        if settings.method == "dpo" and resume is None and settings.trainer.get("loss_type", "sigmoid") == "sigmoid":
            trainer.add_callback(LeavesLn2())
        trainer.add_callback(SaveWhole(context, settings.trainer.get("save_total_limit") or 1, pace))
        trainer.add_callback(WhereItIs(context))
        sizes = [parameter.numel() for parameter in trainer.model.parameters()]
        origin = str(resume) if resume else None
        context.event("ready", parameters=sum(sizes), resume_from=origin, deadline=pace.deadline)

        _measure("before", settings, context, trainer, data)
        if resume is not None and settings.peft is None:
            # Trainer (Transformers 5.23) loads by the names in the file without asking whether any fits; NemotronH is
            # saved under other names, so training would go on from the base weights without a word.
            load_weights(trainer.model, resume, settings)
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        context.event("trained", step=trainer.state.global_step, seconds=round(time.monotonic() - began, 3))
        if context.is_main and settings.method == "grpo":
            _warn_without_signal(context)
        if not context.stop_seen:
            _measure("after", settings, context, trainer, data)
            if context.is_main:
                write_output(_bare(trainer), base, data.template, settings, context.output("model"), engine)
        if context.is_main:
            _draw(settings, context)
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _say_split(split: fourbit.Split, context: Context) -> None:
    if context.is_main:
        in_four, other = (part / fourbit.GIB for part in split)
        print(f"weights: {in_four:.2f} GiB in 4 bits, {other:.2f} GiB in 16", flush=True)
        context.event("loaded-in-4bit", quantised_bytes=split.quantised, other_bytes=split.other)


def _warn_without_signal(context: Context) -> None:
    """GRPO learns from differences within a group: where there was none in any step, say that nothing was learned."""
    equal = [row["frac_reward_zero_std"] for row in read_jsonl(context.dir.metrics) if "frac_reward_zero_std" in row]
    if equal and min(equal) == 1.0:
        print("warning: in no group did the rewards differ, so nothing was learned: are they all wrong, or all right?")
        context.event("no-reward-signal", steps=len(equal))


def _measure(when: str, settings: TrlSettings, context: Context, trainer: Any, data: DataFolder) -> None:
    """Put the held-out measurement of the method into the results."""
    rows = data.rows("test", settings.evaluation.rows)
    if not rows:
        return
    began = time.monotonic()
    model = _bare(trainer)
    tokenizer = trainer.processing_class
    if settings.method in ("sft", "grpo"):
        name = "exact_match"
        prompts, tokens = [row["prompt_ids"] for row in rows], settings.evaluation.max_new_tokens
        value: float | None = exact_match(model, tokenizer, prompts, [_expected(row) for row in rows], tokens, context)
    elif settings.method == "dpo":
        name = "preference_accuracy"
        pairs = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
        value = preference_accuracy(model, pairs, tokenizer.pad_token_id, context)
    else:
        name = "preference_accuracy"
        labelled = [(row["prompt_ids"], row["completion_ids"], row["label"]) for row in rows]
        value = label_accuracy(model, labelled, tokenizer.pad_token_id, context)
    if value is not None and context.is_main:
        context.results[f"{name}_{when}"] = value
        seconds = round(time.monotonic() - began, 3)
        context.event("measured", when=when, rows=len(rows), seconds=seconds, **{name: value})
        print(f"{name.replace('_', ' ')} {when} training: {value:.1%} of {len(rows)} held-out rows", flush=True)


def _expected(row: dict[str, Any]) -> str:
    """The row's expected answer; for SFT rows without one, what the reference turn ends with."""
    if row["expected_answer"] is not None:
        return str(row["expected_answer"])
    return final_answer(row["messages"][-1]["content"] or "") or ""


def _draw(settings: TrlSettings, context: Context) -> None:
    from nemotron_recipes.worker.trl.curves import draw_curves

    draw_curves(context.dir.metrics, context.dir.path / "curves.png", f"{context.run['stage']} ({settings.method})")


def _bare(trainer: Any) -> Any:
    """The model without what wraps it for several processes."""
    return trainer.accelerator.unwrap_model(trainer.model)


def _step_of(checkpoint: Any) -> int:
    """The step in which a checkpoint was saved; 0 without one."""
    return int(checkpoint.name.rpartition("_")[2]) if checkpoint else 0
