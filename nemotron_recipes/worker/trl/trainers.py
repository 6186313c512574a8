"""TRL's trainers on data that data prep has already made.

TRL wants `datasets.Dataset`s and prepares them itself; here a data set holds row numbers only, in the order in which
they are used, and the collator looks the rows up. So the order is ours, and a row is tokenised once, by our rules.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Protocol

import torch
from datasets import Dataset

from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.trl.checkpoints import staging_folder
from nemotron_recipes.worker.trl.config import LoraSettings, TrlSettings
from nemotron_recipes.worker.trl.data import DataFolder
from nemotron_recipes.worker.trl.order import shuffled_epochs
from nemotron_recipes.worker.trl.packed import PackCollator
from nemotron_recipes.worker.trl.rewards import check_rows, rewards_named


def build_trainer(settings: TrlSettings, context: Context, model: Any, tokenizer: Any, data: DataFolder) -> Any:
    """A TRL trainer that is ready to train. UserError: its settings or the data can't be used."""
    build = {"sft": _sft, "dpo": _dpo, "kto": _kto, "grpo": _grpo}[settings.method]
    trainer = build(settings, context, model, tokenizer, data)
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


class Rows(Protocol):
    """A split: a list of rows, or a PackedSplit."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


class Numbered:
    """Rows of several splits under one numbering: the collator serves training and validation alike."""

    def __init__(self, *parts: Rows):
        self.parts = parts

    def __getitem__(self, number: int, /) -> Any:
        for part in self.parts:
            if number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(number)


class RowCollator:
    """Rows `{"index": n}` -> what `inner` makes of the rows with these numbers."""

    def __init__(self, rows: Numbered, inner: Callable[[list[Any]], dict[str, Any]]):
        self.rows = rows
        self.inner = inner

    def __call__(self, numbers: list[dict[str, int]]) -> dict[str, Any]:
        return self.inner([self.rows[number["index"]] for number in numbers])


def with_mismatched(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each prompt the completion of its neighbour as well: KTO estimates its KL term from such pairs, which must
    be the same completions as the batch's own (arXiv 2402.01306, section 4.2)."""
    shifted = [examples[-1], *examples[:-1]]
    return [
        {**example, "KL_completion_ids": other["completion_ids"]}
        for example, other in zip(examples, shifted, strict=True)
    ]


def _sft(settings: TrlSettings, context: Context, model: Any, tokenizer: Any, data: DataFolder) -> Any:
    from trl import SFTConfig, SFTTrainer

    class Trainer(_Prepared, SFTTrainer):
        pass

    train, validation = data.packs("train"), data.packs("validation")
    arguments = _arguments(SFTConfig, settings, context, validation, dataset_kwargs={"skip_prepare_dataset": True})
    packs = Numbered(train, validation)
    return Trainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        data_collator=PackCollator(packs, tokenizer.pad_token_id),
        peft_config=_lora(model, settings.peft),
        **_numbers(arguments, train, validation, context),
    )


def _dpo(settings: TrlSettings, context: Context, model: Any, tokenizer: Any, data: DataFolder) -> Any:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Trainer(_Prepared, DPOTrainer):
        pass

    train, validation = data.rows("train"), data.rows("validation")
    arguments = _arguments(DPOConfig, settings, context, validation)
    pad = DataCollatorForPreference(tokenizer.pad_token_id, arguments.max_length, arguments.truncation_mode)
    return Trainer(
        model=model,
        ref_model=_reference(model, settings),
        args=arguments,
        processing_class=tokenizer,
        data_collator=RowCollator(Numbered(train, validation), pad),
        peft_config=_lora(model, settings.peft),
        **_numbers(arguments, train, validation, context),
    )


def _kto(settings: TrlSettings, context: Context, model: Any, tokenizer: Any, data: DataFolder) -> Any:
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    class Trainer(_Prepared, KTOTrainer):
        pass

    train, validation = data.rows("train"), data.rows("validation")
    arguments = _arguments(KTOConfig, settings, context, validation)
    pad = DataCollatorForUnpairedPreference(tokenizer.pad_token_id, arguments.max_length)
    return Trainer(
        model=model,
        ref_model=_reference(model, settings),
        args=arguments,
        processing_class=tokenizer,
        data_collator=RowCollator(Numbered(train, validation), lambda examples: pad(with_mismatched(examples))),
        peft_config=_lora(model, settings.peft),
        **_numbers(arguments, train, validation, context),
    )


def _grpo(settings: TrlSettings, context: Context, model: Any, tokenizer: Any, data: DataFolder) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    ids_of: dict[str, list[int]] = {}

    class Trainer(_Prepared, GRPOTrainer):
        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            """The ids by our rules: from the text alone, control tokens in a user's words would become real ones."""
            return [ids_of[prompt] for prompt in prompts], None, {}

    def dataset(split: str) -> Dataset:
        rows = data.rows(split)
        texts = []
        for row in rows:
            text, ids = tokenizer.decode(row["prompt_ids"]), row["prompt_ids"]
            if ids_of.setdefault(text, ids) != ids:
                raise UserError(Problem(f"two prompts differ only in what is a control token: {text!r}", "data.path"))
            texts.append(text)
        return Dataset.from_dict(
            {
                "prompt": texts,
                "expected_answer": [row["expected_answer"] for row in rows],
                "extra": [json.dumps(row["extra"]) for row in rows],  # as text: Arrow would give all rows one shape
            }
        )

    rewards = rewards_named(settings, context.inputs.get("grpo.reward_settings.judges"))
    check_rows(settings.rewards, [row for split in ("train", "validation") for row in data.rows(split)])
    train = dataset("train")
    validates = settings.trainer["eval_steps"] < settings.trainer["max_steps"]  # it costs a generation each time
    validation = dataset("validation") if validates else None
    _require_rows(train, context)
    arguments = _arguments(GRPOConfig, settings, context, validation)
    return Trainer(
        model=model,
        reward_funcs=rewards,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=validation or None,
        peft_config=_lora(model, settings.peft),
    )


class _Prepared:
    """What every trainer here does differently: the data is prepared, and there is no model card to write."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass


def _arguments(kind: Any, settings: TrlSettings, context: Context, validation: Any, **extra: Any) -> Any:
    """TRL's config object. UserError: a key of `trainer` is unknown, or TRL refuses a value."""
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    problems = [
        Problem(f"unknown key 'trainer.{key}'", "worker file", nearest(key, known))
        for key in settings.trainer
        if key not in known
    ]
    if problems:
        raise UserError(*problems)
    decided = {
        "output_dir": str(staging_folder(context.dir.checkpoints)),
        "save_strategy": "steps",
        "logging_strategy": "steps",
        "eval_strategy": "steps" if validation else "no",
        "logging_nan_inf_filter": False,
        "report_to": _reporters(settings, context),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
        **extra,
    }
    if "train_sampling_strategy" in known and settings.method != "grpo":
        decided["train_sampling_strategy"] = "sequential"  # the numbers are in order already
    if "gradient_accumulation_steps" in settings.trainer:
        decided["gradient_accumulation_steps"] = _accumulation(settings, context)
    usual = {
        "per_device_eval_batch_size": settings.trainer.get("per_device_train_batch_size"),
        "ddp_find_unused_parameters": False,
    }
    if "max_length" in known:
        usual["max_length"] = None  # TRL's default would cut rows at 1024 tokens without a word
    try:
        return kind(**{**usual, **settings.trainer, **decided})
    except (TypeError, ValueError) as error:
        raise UserError(Problem(f"TRL refuses these settings: {error}", "trainer")) from error


def _reporters(settings: TrlSettings, context: Context) -> list[str]:
    """TRL's own W&B log where it was asked for: it writes offline, to the stage's W&B run. UserError: there is none.

    Left off, the mirror sends metrics.jsonl, which has every figure of it, speed and memory besides.
    """
    if settings.trainer.get("report_to", "none") == "none":
        return []
    if context.wandb is None:
        fix = "name a project in [wandb] of env.toml, and pip install 'nemotron-recipes[wandb]'; or leave it out"
        raise UserError(Problem("report_to is wandb, but this run isn't mirrored to W&B", "backend.native", fix))
    return ["wandb"]


def _accumulation(settings: TrlSettings, context: Context) -> int:
    """The global batch stays what it is when the worker is started by hand on another number of processes."""
    micro_batches = settings.trainer["gradient_accumulation_steps"] * settings.processes
    if micro_batches % context.world_size:
        what = f"{micro_batches} micro batches in a step can't be shared out to {context.world_size} processes"
        raise UserError(Problem(what, "worker file", f"start it on {settings.processes}, as it was planned"))
    return int(micro_batches // context.world_size)


def _numbers(arguments: Any, train: Rows, validation: Rows, context: Context) -> dict[str, Any]:
    """The data sets of row numbers: training rows in the order of use, then validation rows."""
    _require_rows(train, context)
    a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * context.world_size
    order = shuffled_epochs(len(train), arguments.max_steps * a_step, arguments.seed)
    held_out = range(len(train), len(train) + len(validation))
    return {
        "train_dataset": Dataset.from_dict({"index": order}),
        "eval_dataset": Dataset.from_dict({"index": list(held_out)}) if len(held_out) else None,
    }


def _require_rows(train: Any, context: Context) -> None:
    if not len(train):
        raise UserError(
            Problem("the training split is empty", context.artifacts["data.path"].label, "prepare more data")
        )


def _lora(model: Any, lora: LoraSettings | None) -> Any:
    """What the trainer shall add; None where there are no adapters, or the engine has added them."""
    from peft import LoraConfig, PeftModel

    if lora is None or isinstance(model, PeftModel):
        return None

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.dim,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        target_parameters=lora.target_parameters or None,
    )


def _reference(model: Any, settings: TrlSettings) -> Any:
    """A frozen copy of the model as it starts; with adapters TRL switches these off instead."""
    if settings.peft is not None:
        return None
    import copy

    return copy.deepcopy(model).requires_grad_(False).eval()
