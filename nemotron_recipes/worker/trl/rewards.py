"""Verifiable rewards on plain text. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from nemotron_recipes.errors import Problem, UserError, nearest

_MARKED = re.compile(r"####\s*(.+?)\s*$", re.MULTILINE)  # GSM8K's way to mark the final answer
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_FILLER = re.compile(r"[\s$%€£]")


def final_answer(text: str) -> str | None:
    r"""What a completion gives as its answer: `\boxed{x}`, else `#### x`, else the last number, else the whole text.

    Reasoning up to `</think>` is left out: an answer that was only thought of is none.
    """
    text = text.rpartition("</think>")[2]
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    marked = _MARKED.findall(text)
    if marked:
        return str(marked[-1])
    numbers = _NUMBER.findall(text)
    if numbers:
        return str(numbers[-1])
    return text.strip() or None


def normalised(answer: str) -> str:
    """`1,200.50`, `$1200.5` and `1200.500` are one answer; other text is compared without case and outer spaces."""
    bare = _FILLER.sub("", answer).rstrip(".")
    if not _NUMBER.fullmatch(bare):
        return " ".join(answer.split()).rstrip(".").casefold()
    number = Decimal(bare.replace(",", ""))
    whole = number == number.to_integral_value()
    return str(int(number)) if whole else str(number.normalize())


def matches(completion: str, expected: str) -> bool:
    """Whether the completion's final answer equals the expected one."""
    found = final_answer(completion)
    return found is not None and normalised(found) == normalised(expected)


def exact_match(completions: list[Any], expected_answer: list[str], **columns: Any) -> list[float]:
    """1.0 where the final answer is right, else 0.0; the interface of a TRL reward function."""
    pairs = zip(completions, expected_answer, strict=True)
    return [float(matches(_text(completion), expected)) for completion, expected in pairs]


REWARDS: dict[str, Callable[..., list[float]]] = {"exact_match": exact_match}


def rewards_named(names: list[str]) -> list[Callable[..., list[float]]]:
    """UserError: a name is unknown."""
    unknown = [Problem(f"unknown reward '{name}'", fix=nearest(name, REWARDS)) for name in names if name not in REWARDS]
    if unknown:
        raise UserError(*unknown)
    return [REWARDS[name] for name in names]


def _text(completion: Any) -> str:
    """TRL hands over text, or messages where the prompt was messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def _boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, with its braces balanced."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    begin = start + len(r"\boxed{")
    for position in range(begin, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            if depth == 0:
                return text[begin:position].strip()
            depth -= 1
    return None
