"""Base model and tokenizer in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.tiny.model import write_model
from nemotron_recipes.tiny.tokenizer import write_tokenizer
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.hub import folder_of
from nemotron_recipes.worker.trl.config import CONTAINER, TrlSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """Local folders of the base model and of the tokenizer."""

    model: Path
    tokenizer: Path


@contextmanager
def base_folders(settings: TrlSettings, context: Context) -> Iterator[Base]:
    """Bring model and tokenizer to local folders; what the project makes itself lives as long as the context.

    Every rank makes the same tiny model from the same seed.
    """
    with TemporaryDirectory(prefix="nemotron-tiny-") as scratch:
        source = context.artifacts["model.path"].source
        if source == "builtin":
            model = Path(scratch, "model")
            write_model(model, settings.model.arch, settings.trainer.get("seed", 0))
        else:
            model = folder_of(context, "model.path")
        if "model.tokenizer" not in context.artifacts:
            tokenizer = model
        elif context.artifacts["model.tokenizer"].source == "builtin":
            tokenizer = Path(scratch, "tokenizer")
            write_tokenizer(tokenizer)
        else:
            tokenizer = folder_of(context, "model.tokenizer")
        yield Base(model, tokenizer)


def load_model(folder: Path, settings: TrlSettings, **how: Any) -> Any:
    """The model in `settings.model.dtype`. UserError: the folder lacks weights, which would otherwise start random.

    how   further keywords of `from_pretrained`; device_map "meta" reads no weight, only which there are
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[settings.model.dtype],
            attn_implementation=settings.model.attn_implementation,
            output_loading_info=True,
            use_safetensors=True,  # pickles are programs
            **how,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(Problem(f"no model could be loaded from {folder}: {error}", "model.path")) from error
    except ModuleNotFoundError:
        raise  # the runtime names the package
    except ImportError as error:  # Transformers asks for bitsandbytes in words of its own
        what = f"{folder} can't be loaded here: {str(error).strip()}"
        raise UserError(Problem(what, sys.executable, f"use an image that has it ({CONTAINER})")) from error
    lacking = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if lacking:
        what = f"{folder} lacks {len(lacking)} of the model's weights, such as {lacking[0]}"
        raise UserError(Problem(what, "model.path", "give a complete checkpoint; random weights are never filled in"))
    return model


def load_weights(model: Any, folder: Path, settings: TrlSettings) -> None:
    """Replace the weights by those of a checkpoint. UserError: it is one of another architecture."""
    try:
        model.load_state_dict(load_model(folder, settings).state_dict())
    except RuntimeError as error:
        raise UserError(Problem(f"{folder} isn't a checkpoint of this model: {error}", "checkpoint.load")) from error


def load_tokenizer(folder: Path, chat_template: str) -> Any:
    """The tokenizer with the template that the data was prepared with, and with a padding token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(Problem(f"no tokenizer could be loaded from {folder}: {error}", "model.tokenizer")) from error
    tokenizer.chat_template = chat_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
