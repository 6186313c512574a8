"""What loads the model, puts adapters on it and merges them: Transformers and PEFT, or Unsloth in front of them.

Unsloth must be imported before Transformers, which it changes: `choose` comes before any other module of the worker.
Signatures and behaviour: Unsloth 2026.10.9.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.worker.trl.config import CONTAINER, TrlSettings


class Engine(Protocol):
    """The three things that differ; all else is one path."""

    words: str  # what the record says

    def load(self, folder: Path, settings: TrlSettings, longest: Callable[[], int]) -> Any:
        """The base model of a folder. `longest`: tokens of the longest row."""
        ...

    def adapted(self, model: Any, settings: TrlSettings) -> Any:
        """The model to hand to a trainer; without adapters where the trainer adds them."""
        ...

    def write_merged(self, model: Any, base: Path, adapter: Path, settings: TrlSettings, folder: Path) -> None:
        """Base and adapters as one BF16 model in `folder`, where the base was trained on in 4 bits."""
        ...


def choose(settings: TrlSettings) -> Engine:
    """UserError: Unsloth is required, and can't be used here."""
    if settings.unsloth is None:
        return Plain()
    try:
        import unsloth  # type: ignore[import-not-found,unused-ignore]

        return Unsloth(unsloth.__version__)
    except ModuleNotFoundError as error:
        if error.name != "unsloth":
            what = f"Unsloth is installed, but the package '{error.name}' that it needs is not"
            raise UserError(Problem(what, sys.executable, f"use an image that has both ({CONTAINER})")) from error
        reason = "it is not installed"
    except ImportError as error:  # a name that it wants of another package, a library that can't be loaded
        what = f"Unsloth is installed, but can't be imported: {error}"
        raise UserError(Problem(what, sys.executable, f"use an image that has what it needs ({CONTAINER})")) from error
    except NotImplementedError as error:  # what it raises on a machine without a GPU
        reason = str(error).strip().splitlines()[0]
    if settings.unsloth.required:
        fix = f"use an image that has it ({CONTAINER}), or train with TRL alone: backend.native.require_unsloth=false"
        raise UserError(Problem(f"Unsloth can't be used here: {reason}", sys.executable, fix))
    return Plain(f" (not under Unsloth: {reason})")


class Plain:
    """Transformers and PEFT as they are."""

    def __init__(self, why: str = ""):
        self.words = f"TRL{why}"

    def load(self, folder: Path, settings: TrlSettings, longest: Callable[[], int]) -> Any:
        from nemotron_recipes.worker.trl.models import load_model

        if not settings.model.load_in_4bit:
            return load_model(folder, settings)
        from nemotron_recipes.worker.trl.fourbit import bitsandbytes_config, expected, require_room

        require_room(expected(load_model(folder, settings, device_map="meta")))
        return load_model(folder, settings, quantization_config=bitsandbytes_config())

    def adapted(self, model: Any, settings: TrlSettings) -> Any:
        return model

    def write_merged(self, model: Any, base: Path, adapter: Path, settings: TrlSettings, folder: Path) -> None:
        from peft import PeftModel

        from nemotron_recipes.worker.trl.models import load_model

        whole = load_model(base, settings, device_map="cpu")
        PeftModel.from_pretrained(whole, adapter).merge_and_unload().save_pretrained(folder)


class Unsloth:
    """Its loader, its adapters (with its own activation checkpointing), and its shard-by-shard merge."""

    def __init__(self, version: str):
        self.words = f"Unsloth {version}"

    def load(self, folder: Path, settings: TrlSettings, longest: Callable[[], int]) -> Any:
        from unsloth import FastLanguageModel  # type: ignore[import-not-found,unused-ignore]

        from nemotron_recipes.worker.trl.models import DTYPES, load_model

        load_model(folder, settings, device_map="meta")  # whether all weights are there: Unsloth wouldn't say
        wanted = DTYPES[settings.model.dtype]
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder),
            max_seq_length=longest(),
            dtype=wanted,
            load_in_4bit=settings.model.load_in_4bit,
            full_finetuning=settings.peft is None,
            use_gradient_checkpointing=_checkpointing(settings),
            use_exact_model_name=True,  # else it may take another repository's weights, quantised already
            random_state=settings.trainer.get("seed", 0),
        )
        found = model.get_output_embeddings().weight.dtype
        if settings.peft is not None and found != wanted:
            raise JobFailed(f"Unsloth was asked for {wanted}, and loaded the model in {found}")
        return model

    def adapted(self, model: Any, settings: TrlSettings) -> Any:
        if settings.peft is None:
            return model
        from unsloth import FastLanguageModel

        lora = settings.peft
        return FastLanguageModel.get_peft_model(
            model,
            r=lora.dim,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            target_parameters=lora.target_parameters or None,
            use_gradient_checkpointing=_checkpointing(settings),
            random_state=settings.trainer.get("seed", 0),
        )

    def write_merged(self, model: Any, base: Path, adapter: Path, settings: TrlSettings, folder: Path) -> None:
        from transformers import AutoTokenizer

        model.save_pretrained_merged(str(folder), AutoTokenizer.from_pretrained(base), save_method="merged_16bit")


def _checkpointing(settings: TrlSettings) -> str | bool:
    """Unsloth's, which offloads to the host's memory, unless the recipe says that none is wanted."""
    return "unsloth" if settings.trainer.get("gradient_checkpointing", True) else False
