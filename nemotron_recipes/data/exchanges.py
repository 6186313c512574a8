"""Conversation logs -> exchanges: a prompt with one answer and its score -> rows for SFT, KTO and DPO.

A line is what OpenAI's chat API takes and gives: `{"messages": [...]}` ending with the answer, or the messages (also
below `request`) with `choices` (also below `response`). Several choices, or several lines with one prompt, make pairs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nemotron_recipes.data.gates.simple import number
from nemotron_recipes.data.gates.text import lookup
from nemotron_recipes.data.messages import BadRow, read_message, read_tools
from nemotron_recipes.data.readers import open_lines
from nemotron_recipes.data.splits import digest

TARGETS = ("sft", "kto", "dpo")
_PARTS = ("messages", "tools", "request", "response", "choices")


@dataclass(frozen=True)
class Exchange:
    """`prompt` and `answer` as the log has them; `fields`: what else stood in the line; `score`: from a field."""

    prompt: list[dict[str, Any]]
    answer: dict[str, Any]
    tools: list[dict[str, Any]]
    fields: dict[str, Any]
    score: float | None


@dataclass(frozen=True)
class Judged:
    """What is known of an answer's quality. `agreement`: 0 to 1, where several judges were asked."""

    score: float
    scores: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None


@dataclass(frozen=True)
class Limits:
    """Scores from `good` are good answers, up to `bad` bad ones; a pair's scores lie at least `margin` apart."""

    good: float
    bad: float | None = None
    margin: float = 0.0


@dataclass
class Counts:
    """Lines read, exchanges found, rows written, and why lines and exchanges became none."""

    lines: int = 0
    exchanges: int = 0
    used: int = 0  # exchanges that are in a row
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def read_exchanges(paths: Iterable[Path], score_field: str | None, counts: Counts) -> Iterator[Exchange]:
    """The exchanges of JSON Lines files (.gz, .zst too), in order. UserError: a file can't be read."""
    for path in paths:
        with open_lines(str(path)) as handle:
            for line in handle:
                if line.strip():
                    counts.lines += 1
                    yield from _line(line, score_field, counts)


def write_rows(
    judged: Iterable[tuple[Exchange, Judged | None]], target: str, limits: Limits, out: IO[str], scratch: IO[bytes],
    counts: Counts,
) -> None:  # fmt: skip
    """Rows of method `target` to `out`. `scratch`: an empty file, for the answers to pair."""
    pairs: dict[bytes, list[tuple[float, int]]] = {}
    for exchange, verdict in judged:
        counts.exchanges += 1
        if verdict is None:
            counts.left_out["no_score"] += 1
            continue
        if target == "dpo":
            entry = (verdict.score, scratch.seek(0, 2))
            scratch.write(_dump({"exchange": vars(exchange), "judged": vars(verdict)}).encode() + b"\n")
            same = pairs.setdefault(digest([exchange.tools, exchange.prompt]), [])
            same.append(entry)
            if len(same) > 2:  # the best and the worst are enough; of equal ones the first
                best, worst = max(same, key=lambda e: (e[0], -e[1])), min(same)
                same[:] = sorted({best, worst}, key=lambda e: e[1])
                counts.left_out["between_best_and_worst"] += 3 - len(same)
            continue
        reason, row = _sft(exchange, verdict, limits) if target == "sft" else _kto(exchange, verdict, limits)
        if row is None:
            counts.left_out[reason] += 1
        else:
            _write(row, exchange, verdict, out, counts, 1)
    for same in pairs.values():
        _pair(same, limits, out, scratch, counts)


def _line(line: bytes, score_field: str | None, counts: Counts) -> Iterator[Exchange]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise BadRow("not_an_object", "")
        yield from _exchanges(row, score_field)
    except (ValueError, RecursionError):
        counts.left_out["invalid_json"] += 1
    except BadRow as bad:
        counts.left_out[bad.reason] += 1


def _exchanges(row: dict[str, Any], score_field: str | None) -> list[Exchange]:
    request = row["request"] if isinstance(row.get("request"), dict) else row
    response = row["response"] if isinstance(row.get("response"), dict) else row
    messages, choices = request.get("messages"), response.get("choices")
    if isinstance(choices, list) and any(isinstance(choice, dict) and "delta" in choice for choice in choices):
        raise BadRow("streamed_chunk", "a piece of an answer: log the answer as a whole")
    if not isinstance(messages, list) or not messages:
        raise BadRow("missing_field", "no messages")
    tools = read_tools(request.get("tools", row.get("tools")))
    fields = {key: value for key, value in row.items() if key not in _PARTS}
    score = number(lookup(row, score_field)) if score_field else None
    if choices is None:
        prompt, answers = messages[:-1], [(messages[-1], score)]
    elif choices == []:
        raise BadRow("no_assistant", "no choices")
    elif isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        own = [number(lookup(choice, score_field)) if score_field else None for choice in choices]
        alone = len(choices) == 1
        answers = [
            (c.get("message"), s if s is not None else score if alone else None)
            for c, s in zip(choices, own, strict=True)
        ]
        prompt = messages
    else:
        raise BadRow("wrong_type", "choices must be a list of objects")
    for index, message in enumerate(prompt):
        read_message(message, f"messages[{index}]", split_thoughts=False)
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise BadRow("bad_order", "the prompt must end with a user's turn or a tool result")
    for answer, _ in answers:
        if read_message(answer, "the answer", split_thoughts=False)["role"] != "assistant":
            raise BadRow("no_assistant", "the last turn is not the assistant's")
    return [Exchange(prompt, answer, tools, fields, value) for answer, value in answers]


def _sft(exchange: Exchange, judged: Judged, limits: Limits) -> tuple[str, dict[str, Any] | None]:
    if judged.score < limits.good:
        return "low_score", None
    return "", {"messages": [*exchange.prompt, exchange.answer]}


def _kto(exchange: Exchange, judged: Judged, limits: Limits) -> tuple[str, dict[str, Any] | None]:
    good = judged.score >= limits.good
    if not good and (limits.bad is None or judged.score > limits.bad):
        return "neither_good_nor_bad", None
    return "", {"prompt": exchange.prompt, "completion": [exchange.answer], "label": good}


def _pair(same: list[tuple[float, int]], limits: Limits, out: IO[str], scratch: IO[bytes], counts: Counts) -> None:
    best, worst = max(same, key=lambda entry: (entry[0], -entry[1])), min(same)
    if len(same) == 1:
        counts.left_out["no_other_answer"] += 1
        return
    reason = ""
    if best[0] < limits.good:
        reason = "low_score"
    elif limits.bad is not None and worst[0] > limits.bad:
        reason = "no_bad_answer"
    elif best[0] - worst[0] < limits.margin or best[0] == worst[0]:
        reason = "too_close"
    if reason:
        counts.left_out[reason] += len(same)
        return
    chosen, rejected = (_load(scratch, entry[1]) for entry in (best, worst))
    exchange, judged = chosen
    if exchange.answer == rejected[0].answer:
        counts.left_out["same_pair"] += len(same)
        return
    row = {"prompt": exchange.prompt, "chosen": [exchange.answer], "rejected": [rejected[0].answer],
           "rejected_score": rejected[1].score}  # fmt: skip
    _write(row, exchange, judged, out, counts, 2)


def _load(scratch: IO[bytes], place: int) -> tuple[Exchange, Judged]:
    scratch.seek(place)
    entry = json.loads(scratch.readline())
    return Exchange(**entry["exchange"]), Judged(**entry["judged"])


def _write(row: dict[str, Any], exchange: Exchange, judged: Judged, out: IO[str], counts: Counts, used: int) -> None:
    row |= {"tools": exchange.tools} if exchange.tools else {}
    row |= {"score": judged.score} | ({"scores": judged.scores} if judged.scores else {})
    row |= {"agreement": judged.agreement} if judged.agreement is not None else {}
    out.write(_dump({**exchange.fields, **row}) + "\n")
    counts.rows += 1
    counts.used += used


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)
