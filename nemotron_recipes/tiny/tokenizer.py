"""The tiny tokenizer: byte-level BPE with Nemotron 3's control tokens and a few hundred ids in all.

Any Unicode text encodes and decodes without loss, because the base vocabulary is the 256 bytes. Digits are single
tokens. Merges exist only for the words of the chat frame and of the tiny tasks, so that their sequences are short.
Needs the `tokenizers` library; no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemotron_recipes.fsio import write_atomic

# The order gives the ids. Nemotron 3 ends a turn, and so a completion, with <|im_end|>.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
# Control tokens that stay visible when a completion is decoded with skip_special_tokens, as in the real tokenizer.
MARKER_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
WORDS = ("system", "user", "assistant", "Largest", " of")
CHAT_TEMPLATE = Path(__file__).parent.parent / "data" / "templates" / "nemotron3.jinja"


def write_tokenizer(folder: Path) -> None:
    """Write a Hugging Face fast tokenizer into `folder`: the same bytes every time, chat template included."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "tokenizer.json", _build().to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    write_atomic(folder / "tokenizer_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
    write_atomic(folder / "chat_template.jinja", CHAT_TEMPLATE.read_text(encoding="utf-8"))


def vocabulary_size() -> int:
    """How many ids the tokenizer has; the tiny model's embedding has exactly as many rows."""
    return int(_build().get_vocab_size(with_added_tokens=True))


def _build() -> Any:
    """A `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *MARKER_TOKENS))}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(symbol, len(vocabulary))
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = word.replace(" ", "Ġ")  # the byte alphabet's sign for a space
        for end in range(2, len(symbols) + 1):
            if symbols[:end] not in vocabulary:
                vocabulary[symbols[:end]] = len(vocabulary)
                merges.append((symbols[: end - 1], symbols[end - 1]))

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in MARKER_TOKENS])
    return tokenizer
