"""Tokenizer engines: texts -> ids. `tokenizers` is the reference; `fastokens` is an opt-in that must agree with it."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from nemotron_recipes.errors import Problem, UserError

# What byte-level tokenizers disagree about first: spaces, line ends, digits, scripts, marks, emoji, control characters.
PROBES = (
    "",
    " ",
    "  two  spaces\tand\ttabs \n\n\n after lines\r\n",
    "It's we're I'LL they'd; a_b.c(d)[e]{f} <g> #h @i $j %k ^l &m *n",
    "0 1 12 123 1234 12345678901234567890 3.14159 1e-9 0x7f",
    "def f(x):\n    return {'a': x[1:-1]}\n\t\t# done\n",
    "naïve café Ünïcödé ﬁ ½ ²",
    "日本語のテキスト 中文字符 한국어 ไทย العربية עברית हिन्दी",
    "e\u0301 a\u030a \u200b\u200d\ufeff \u00a0\u2003 \u2028\u2029",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 \U0001f9ff",
    "\x00\x01\x1f\x7f\x80\x9f",
    "a" * 300 + "!" * 300 + " " * 300 + "\n" * 300,
)


class Engine(Protocol):
    """Encodes without adding, cutting or padding anything."""

    name: str

    def encode(self, texts: Sequence[str], plain: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 of all texts one after another, bounds int64 [texts + 1]); they may be read-only. `plain`: tokens
        that the tokenizer's file flags as special are text like any other."""
        ...


class Reference:
    """Hugging Face's `tokenizers`."""

    name = "tokenizers"

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str], plain: bool = False) -> tuple[np.ndarray, np.ndarray]:
        self._tokenizer.encode_special_tokens = plain
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = False
        rows = [np.frombuffer(array("i", one.ids), dtype=np.int32) for one in encodings]  # quicker than from a list
        bounds: np.ndarray = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=bounds[1:])
        return np.concatenate([np.empty(0, dtype=np.int32), *rows]), bounds


class Fastokens:
    """The `fastokens` library: the same ids, many times faster."""

    name = "fastokens"

    def __init__(self, tree: dict[str, Any], path: Path):
        # What runs side by side here are processes. With threads of its own it keeps a cache for each, and one that
        # they share, which grow with the data for long.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        try:
            import fastokens
        except ImportError:
            what = "data.engine=fastokens: the package is not installed"
            raise UserError(Problem(what, fix="pip install 'nemotron-recipes[fastokens]'")) from None
        try:
            self._tokenizer = fastokens.Tokenizer.from_json_str(orjson.dumps(tree).decode("utf-8"))
        except (ValueError, RuntimeError) as error:
            fix = "leave data.engine=tokenizers"
            raise UserError(Problem(f"fastokens can't read this tokenizer: {error}", str(path), fix)) from None

    def encode(self, texts: Sequence[str], plain: bool = False) -> tuple[np.ndarray, np.ndarray]:
        ids, bounds = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=plain)
        return np.frombuffer(ids, dtype="<i4"), np.frombuffer(bounds, dtype="<i8")


def agree(one: Engine, other: Engine, texts: Sequence[str]) -> bool:
    """Whether two engines give the same ids for all texts, special tokens acting or not."""
    for plain in (False, True):
        (ids, bounds), (other_ids, other_bounds) = one.encode(texts, plain), other.encode(texts, plain)
        if not (np.array_equal(bounds, other_bounds) and np.array_equal(ids, other_ids)):
            return False
    return True


def byte_widths(tree: dict[str, Any], size: int) -> np.ndarray | None:
    """How many bytes of text each id stands for, where that is a fact of the id alone: byte-level BPE that normalises
    nothing and whose added tokens swallow no spaces. With it offsets are a cumulative sum. Otherwise None."""
    model = tree.get("model") or {}
    stages = _stages(tree.get("pre_tokenizer"))
    byte_level = [stage for stage in stages if stage.get("type") == "ByteLevel"]
    added = tree.get("added_tokens", [])
    if (
        model.get("type") != "BPE"
        or tree.get("normalizer") is not None
        or len(byte_level) != 1
        or byte_level[0].get("add_prefix_space")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or any(token.get("lstrip") or token.get("rstrip") or token.get("single_word") for token in added)
        or any(stage.get("behavior") == "Removed" for stage in stages)
    ):
        return None
    widths: np.ndarray = np.zeros(size, dtype=np.int64)
    for token, index in model["vocab"].items():
        if index < size:
            widths[index] = len(token)  # in the byte alphabet one character is one byte
    for token in added:
        widths[token["id"]] = len(token["content"].encode("utf-8"))
    return widths.astype(np.min_scalar_type(int(widths.max(initial=0))))  # small, so that it stays in the cache


def _stages(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [stage for one in pre_tokenizer["pretokenizers"] for stage in _stages(one)]
    return [pre_tokenizer]
