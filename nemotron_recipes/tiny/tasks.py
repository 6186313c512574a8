"""Rows of tasks that a tiny model really learns. Standard library only.

A hash of the problem, whatever the order in which it is stated, decides its split: the splits are disjoint whichever
seeds and counts are asked for.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nemotron_recipes.errors import Problem, UserError, nearest

SPLITS = ("train", "validation", "test")
_TENTHS = ("test", "validation", *["train"] * 8)  # the split of each tenth of all problems


@dataclass(frozen=True)
class Question:
    """One problem as text: what is asked, the answer, and a plausible wrong answer."""

    key: str  # the same for all ways to state the same problem
    prompt: str
    answer: str
    wrong: str


def rows(task: str, method: str, split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` rows of `task` in the form that data prep reads for `method`; the same for the same arguments.

    sft: messages; dpo: prompt, chosen, rejected; kto: prompt, completion, label; rl: prompt, expected_answer.
    The problems depend on task, split and seed only, so that all methods can be measured on the same test problems.
    A problem comes twice only when the split has no others left.
    """
    for kind, word, valid in (("task", task, TASKS), ("method", method, _FORMS), ("split", split, SPLITS)):
        if word not in valid:
            raise UserError(Problem(f"the samples have no {kind} '{word}'", fix=nearest(word, valid)))
    form = _FORMS[method]
    for index, question in enumerate(_questions(task, split, count, seed)):
        yield form(question, index)


def _questions(task: str, split: str, count: int, seed: int) -> Iterator[Question]:
    """Random questions of a split, without repetition until 10,000 draws in a row bring nothing new."""
    draw = TASKS[task]
    generator = random.Random(f"{task}/{split}/{seed}")
    seen: set[str] = set()
    made = idle = 0
    while made < count:
        question = draw(generator)
        idle += 1
        if question.prompt in seen or _split_of(task, question.key) != split:
            if idle == 10_000:
                seen.clear()
                idle = 0
            continue
        seen.add(question.prompt)
        idle = 0
        made += 1
        yield question


def _split_of(task: str, key: str) -> str:
    digest = hashlib.sha256(f"{task}/{key}".encode()).digest()
    return _TENTHS[int.from_bytes(digest[:8], "big") % len(_TENTHS)]


def _largest_of_three(generator: random.Random) -> Question:
    """Three different two-digit numbers, so that every prompt has the same length.

    Wrong is the mistake that a half-trained model makes: the right first digit with the last digit of another number.
    """
    numbers = generator.sample(range(10, 100), 3)
    ordered = sorted(numbers)
    largest = ordered[2]
    mixed = [largest // 10 * 10 + number % 10 for number in ordered[:2] if number % 10 != largest % 10]
    return Question(
        key=" ".join(map(str, ordered)),
        prompt="Largest of " + " ".join(map(str, numbers)) + "?",
        answer=str(largest),
        wrong=str(generator.choice(mixed or ordered[:2])),
    )


def _sft(question: Question, index: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question.prompt},
            {"role": "assistant", "content": question.answer},
        ]
    }


def _dpo(question: Question, index: int) -> dict[str, Any]:
    return {"prompt": question.prompt, "chosen": question.answer, "rejected": question.wrong}


def _kto(question: Question, index: int) -> dict[str, Any]:
    """Right and wrong completions in turn: KTO needs both labels in every batch."""
    desirable = index % 2 == 0
    completion = question.answer if desirable else question.wrong
    return {"prompt": question.prompt, "completion": completion, "label": desirable}


def _rl(question: Question, index: int) -> dict[str, Any]:
    return {"prompt": question.prompt, "expected_answer": question.answer}


TASKS: dict[str, Callable[[random.Random], Question]] = {"largest_of_three": _largest_of_three}
_FORMS: dict[str, Callable[[Question, int], dict[str, Any]]] = {"sft": _sft, "dpo": _dpo, "kto": _kto, "rl": _rl}
