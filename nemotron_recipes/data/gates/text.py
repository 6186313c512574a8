"""The texts of a row, and its words, as the gates look at them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from nemotron_recipes.data.messages import Message
from nemotron_recipes.data.rows import Row

TALKS = ("messages", "prompt", "chosen", "rejected", "completion")
_OTHERS = ("text", "expected_answer", "tools", "extra")
_SHOWN = 60  # characters of a text in an example
# A word, or one character of a script that writes without spaces.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying loses nothing modulo 2**64


def messages(row: Row) -> Iterator[tuple[str, Message]]:
    """(where, message) of every turn."""
    for name in TALKS:
        for index, message in enumerate(getattr(row, name)):
            yield f"{name}[{index}]", message


def texts(row: Row) -> Iterator[tuple[str, str]]:
    """(where, text) of everything in the row that a person or a program has written; keys of objects are left out."""
    for where, message in messages(row):
        for key, value in message.items():
            if key != "role":
                yield from _strings(value, f"{where}.{key}")
    for name in _OTHERS:
        yield from _strings(getattr(row, name), name)


def replaced(row: Row, change: Callable[[str], str]) -> Row:
    """The row with every text of `texts` changed."""
    new: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if field.name in TALKS:
            new[field.name] = [{k: v if k == "role" else _mapped(v, change) for k, v in m.items()} for m in value]
        elif field.name in _OTHERS:
            new[field.name] = _mapped(value, change)
    return replace(row, **new)


def said(row: Row, roles: Collection[str]) -> list[str]:
    """The contents of turns of these roles; a document."""
    if row.text is not None:
        return [row.text]
    return [message["content"] for _, message in messages(row) if message["role"] in roles]


def answers(row: Row) -> list[str]:
    """What a model is to write: reasoning and content of assistant turns, of pairs the chosen one; a document. rl:
    nothing."""
    if row.text is not None:
        return [row.text]
    turns = [m for m in row.messages if m["role"] == "assistant"] + row.chosen + row.completion
    return ["\n".join(filter(None, (turn.get("reasoning_content"), turn["content"]))) for turn in turns]


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation; of scripts without spaces, characters."""
    return _WORD.findall(text.lower())


def words_at(text: str, first: int, count: int) -> tuple[int, int]:
    """(start, end) in `text` of `count` of its `words`, from number `first` on."""
    spans = [match.span() for match in islice(_WORD.finditer(text), first, first + count)]
    return (spans[0][0], spans[-1][1]) if spans else (0, 0)


def ngram_hashes(hashes: np.ndarray, length: int) -> np.ndarray:
    """uint64 [n - length + 1]: a hash of each run of `length` of the uint64 `hashes`. The order within it counts."""
    count = len(hashes) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        result: np.ndarray = np.zeros(count, dtype=np.uint64)
        for offset in range(length):
            result = mixed(result * _STEP + hashes[offset : offset + count])
    return result


def word_hashes(found: list[str]) -> np.ndarray:
    """uint64: a hash of each word."""
    return np.fromiter(map(_word_hash, found), dtype=np.uint64, count=len(found))


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 with every bit depending on every bit: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def short(text: str) -> str:
    """A piece of text for an example, on one line."""
    text = " ".join(text[: 4 * _SHOWN].split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def lookup(row: dict[str, Any], path: str) -> Any:
    """The value of a field; a dot goes into an object, where no field has the whole name. None: there is none."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{where}[{index}]")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value
