"""A fake of Unsloth: the loader's and the adapters' keywords as Unsloth 2026.10.9 has them, on Transformers and PEFT.

The real one wants a GPU. What the fake can't show: its patches of Transformers and TRL, its kernels, its memory.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

VERSION = "2026.10.9-fake"


class FastLanguageModel:
    """Keyword for keyword what the worker may use; `calls` holds what it did use. An unknown keyword is a TypeError."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012  emptied by `install`
    quantises = False  # like the real one where bitsandbytes can't be used: 4 bits are asked for, and left out

    @classmethod
    def from_pretrained(
        cls,
        model_name="unsloth/Llama-3.2-1B-Instruct",
        max_seq_length=2048,
        dtype=None,
        load_in_4bit=True,
        full_finetuning=False,
        use_gradient_checkpointing="unsloth",
        use_exact_model_name=False,
        random_state=3407,
    ):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        cls.calls.append(("from_pretrained", {key: value for key, value in locals().items() if key != "cls"}))
        return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), AutoTokenizer.from_pretrained(model_name)

    @classmethod
    def get_peft_model(
        cls,
        model,
        r=16,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        lora_alpha=16,
        lora_dropout=0.0,
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        target_parameters=None,
    ):
        from peft import LoraConfig, get_peft_model

        cls.calls.append(("get_peft_model", {key: value for key, value in locals().items() if key != "cls"}))
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=list(target_modules),
            target_parameters=target_parameters,
        )
        return get_peft_model(model, config)


def install(monkeypatch: pytest.MonkeyPatch) -> type[FastLanguageModel]:
    """Make `import unsloth` find the fake."""
    module = ModuleType("unsloth")
    module.FastLanguageModel = FastLanguageModel  # type: ignore[attr-defined]
    module.__version__ = VERSION  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", module)
    FastLanguageModel.calls.clear()
    return FastLanguageModel
