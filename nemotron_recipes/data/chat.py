"""Conversations -> training samples, and prompts and answers -> ids: what is rendered and which turns are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nemotron_recipes.data.encoder import Encoded, Encoder, keep_blocks
from nemotron_recipes.data.messages import BadRow, Message
from nemotron_recipes.data.rows import Row


class Sample(NamedTuple):
    """A conversation to render, and the indices of the assistant turns to learn from."""

    messages: list[Message]
    learned: tuple[int, ...]


class _Job(NamedTuple):
    """One text to render and encode. `prompt`: it ends with a generation prompt."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    prompt: bool
    thinking: bool


def samples(messages: list[Message]) -> list[Sample]:
    """With reasoning, one sample per user turn that is answered, learning only what follows it: the template cuts
    reasoning out of earlier turns. Without, one sample that learns from every assistant turn. `weight: 0` turns are
    never learned from; a sample without anything to learn is left out."""
    users: list[int] = []
    if [True for message in messages if message.get("reasoning_content")]:
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        learned = _learned(messages, -1)
        return [Sample(messages, learned)] if learned else []
    ends = [*users[1:], len(messages)]
    found = [Sample(messages[:end], _learned(messages[:end], start)) for start, end in zip(users, ends, strict=True)]
    return [sample for sample in found if sample.learned]


class ChatEncoder:
    """Samples and rows to ids, many at a time. `quick`: fast rendering and the chosen engine where they are exact;
    otherwise the reference alone."""

    def __init__(self, encoder: Encoder, thinking: bool, quick: bool = True):
        self.encoder = encoder
        self.thinking = thinking
        self.quick = quick

    def reference(self) -> ChatEncoder:
        """The same without the quick way."""
        return ChatEncoder(self.encoder, self.thinking, quick=False)

    def conversations(self, rows: Sequence[Row]) -> list[list[Encoded] | BadRow]:
        """The samples of each row, encoded, in order."""
        plans = [samples(row.messages) for row in rows]
        jobs = [_Job(sample.messages, row.tools, False, self.thinking)
                for plan, row in zip(plans, rows, strict=True) for sample in plan]  # fmt: skip
        encoded = iter(self._encode(jobs))
        results: list[list[Encoded] | BadRow] = []
        for plan in plans:
            parts = [_learn(next(encoded), sample) for sample in plan]
            bad = next((part for part in parts if isinstance(part, BadRow)), None)
            results.append(bad if bad else [part for part in parts if isinstance(part, Encoded)])
        return results

    def prompts(self, rows: Sequence[Row]) -> list[np.ndarray | BadRow]:
        """Ids up to and including the generation prompt. A conversation's prompt ends where its last answer begins,
        and opens a reasoning block only where that answer reasons: an evaluation asks as training did."""
        return [
            one if isinstance(one, BadRow) else one.ids for one in self._encode([self._prompt(row) for row in rows])
        ]

    def answers(self, rows: Sequence[Row], names: Sequence[str]) -> list[list[np.ndarray] | BadRow]:
        """For each row the prompt's ids and then those of each named answer, its end of turn included. The prompt is
        what all answers share before the model has to write: answers differ where one reasons and one doesn't."""
        jobs = [
            _Job(row.prompt + getattr(row, name), row.tools, False, self.thinking) for row in rows for name in names
        ]
        encoded = self._encode(jobs)
        count = len(names)
        return [_prompt_and_answers(encoded[index * count : (index + 1) * count]) for index in range(len(rows))]

    def differs(self, row: Row) -> bool:
        """Whether the quick way (fast rendering, another engine) gives anything else than the reference for this row.
        A row of answers is looked at as the conversations that it consists of."""
        reference = self.reference()
        answers = [one for one in (row.chosen, row.rejected, row.completion) if one] or [[]]
        talks = [row.messages] if row.messages else [row.prompt + answer for answer in answers]
        jobs = [_Job(messages, row.tools, False, self.thinking) for messages in talks]
        pairs = zip(self._encode(jobs), reference._encode(jobs), strict=True)
        return not all(_same(one, other) for one, other in pairs)

    def _prompt(self, row: Row) -> _Job:
        if row.prompt:
            return _Job(row.prompt, row.tools, True, self.thinking)
        asked = _asked(row.messages)
        reasons = "reasoning_content" in row.messages[len(asked)]
        return _Job(asked, row.tools, True, self.thinking and reasons)

    def _encode(self, jobs: Sequence[_Job]) -> list[Encoded | BadRow]:
        """Rendered and encoded: the quick way first, and the reference for what that declines or can't do exactly."""
        results: list[Encoded | BadRow | None] = [None] * len(jobs)
        fast = self.encoder.fast_render if self.quick else None
        if fast is not None:
            tried = [(index, fast(job.messages, job.tools, job.prompt, job.thinking)) for index, job in enumerate(jobs)]
            taken = [(index, one) for index, one in tried if one is not None]
            for (index, _), encoded in zip(taken, self.encoder.encode([one for _, one in taken]), strict=True):
                results[index] = encoded
        left = [index for index, one in enumerate(results) if one is None]
        good = []
        for index in left:
            job = jobs[index]
            try:
                rendered = self.encoder.template.render(
                    job.messages, job.tools, add_generation_prompt=job.prompt, enable_thinking=job.thinking
                )
                good.append((index, rendered))
            except BadRow as bad:
                results[index] = bad
        for (index, _), one in zip(good, self.encoder.encode([r for _, r in good], self.quick), strict=True):
            results[index] = one
        return [one for one in results if one is not None]


def _same(one: Encoded | BadRow, other: Encoded | BadRow) -> bool:
    if isinstance(one, BadRow) or isinstance(other, BadRow):
        return isinstance(one, BadRow) and isinstance(other, BadRow) and one.reason == other.reason
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.mask, other.mask) and one.blocks == other.blocks


def _learned(messages: list[Message], after: int) -> tuple[int, ...]:
    return tuple(
        [  # a list first: it is quicker
            index
            for index, message in enumerate(messages)
            if index > after and message["role"] == "assistant" and message.get("weight") != 0
        ]
    )


def _learn(encoded: Encoded | BadRow, sample: Sample) -> Encoded | BadRow:
    """Keep the generation blocks of the learned turns. A template marks either every assistant turn or just these."""
    if isinstance(encoded, BadRow):
        return encoded
    if len(encoded.blocks) == len(sample.learned):
        return encoded
    turns = [index for index, message in enumerate(sample.messages) if message["role"] == "assistant"]
    if len(encoded.blocks) == len(turns):
        return keep_blocks(encoded, [block for block, turn in enumerate(turns) if turn in sample.learned])
    return BadRow("template_refused", f"{len(turns)} assistant turns give {len(encoded.blocks)} generation blocks")


def _asked(messages: list[Message]) -> list[Message]:
    """The conversation up to its last answer's question."""
    end = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def _prompt_and_answers(group: Sequence[Encoded | BadRow]) -> list[np.ndarray] | BadRow:
    """The answer is the last generation block; what the template writes after the end of the turn is left out."""
    starts = []
    whole = []
    for one in group:
        if isinstance(one, BadRow):
            return one
        if not one.blocks or one.blocks[-1][0] == one.blocks[-1][1]:
            return BadRow("template_refused", "the answer gives no generation block")
        start, end = one.blocks[-1]
        starts.append(start)
        whole.append(one.ids[:end])
    length = min(starts)
    first = whole[0]
    for ids in whole[1:]:
        differs = np.flatnonzero(ids[:length] != first[:length])
        length = int(differs[0]) if len(differs) else length
    return [first[:length], *(ids[length:] for ids in whole)]
