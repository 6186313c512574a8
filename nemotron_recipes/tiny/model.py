"""The tiny model: Transformers' own NemotronH class, randomly initialised, with the tiny tokenizer's vocabulary.

Mamba-2, mixture-of-experts and attention layers as in Nemotron 3, at a size that a laptop trains in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.tiny.tokenizer import SPECIAL_TOKENS, vocabulary_size, write_tokenizer


def write_model(folder: Path, arch: dict[str, Any], seed: int) -> None:
    """Write a Hugging Face folder (float32 safetensors, tokenizer, chat template); the same weights for the same seed.

    arch: fields of NemotronHConfig. UserError: these values make no model.
    """
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM

    tokens = {name: SPECIAL_TOKENS.index(token) for name, token in _TOKENS.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = NemotronHForCausalLM(NemotronHConfig(vocab_size=vocabulary_size(), **tokens, **arch))
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise UserError(Problem(f"model.arch makes no model: {error}", fix="see conf/model/tiny.yaml")) from error
    model.save_pretrained(folder)
    write_tokenizer(folder)


_TOKENS = {"bos_token_id": "<s>", "eos_token_id": "<|im_end|>", "pad_token_id": "<pad>"}
