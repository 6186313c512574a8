"""Rows as they come -> one normalised form per method, or a `BadRow` that says what is wrong (docs/data.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nemotron_recipes.data.messages import BadRow, Message, is_plain, read_message, read_tools
from nemotron_recipes.data.settings import Columns

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "question"),
    "response": ("response", "answer"),
    "expected_answer": ("expected_answer",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "completion": ("completion",),
    "label": ("label",),
    "text": ("text",),
}


@dataclass
class Row:
    """A normalised row. sft: `messages`; dpo: prompt, chosen, rejected; kto: prompt, completion, label;
    rl: prompt, expected_answer, extra; pretrain: text."""

    messages: list[Message] = field(default_factory=list)
    prompt: list[Message] = field(default_factory=list)
    chosen: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)
    completion: list[Message] = field(default_factory=list)
    label: bool | None = None
    text: str | None = None
    expected_answer: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowReader:
    """How the rows of a data set are read. `split_thoughts`: the template renders `reasoning_content`."""

    method: str
    columns: Columns
    answer_pattern: str | None = None
    split_thoughts: bool = True

    def read(self, row: Any) -> Row:
        """The normalised row. BadRow: it is none."""
        if not isinstance(row, dict):
            raise BadRow("not_an_object", f"a JSON object is expected, not {type(row).__name__}")
        if self.method == "pretrain":
            return self._document(row)
        result = self._read(row)
        if self.method != "sft":  # weights are about SFT's loss
            for message in result.prompt + result.chosen + result.rejected + result.completion:
                message.pop("weight", None)
        result.tools = read_tools(row.get("tools"))
        _check_tool_markup(result)
        return result

    def _sft(self, row: dict[str, Any]) -> Row:
        explicit_prompt = self.columns.prompt is not None or self.columns.response is not None
        if not explicit_prompt and (self._find(row, "messages") is not None or self._find(row, "prompt") is None):
            messages = self._messages(self._get(row, "messages"), "messages")
        else:
            answer = self._as_answer(self._get(row, "response"), "response")
            messages = self._as_prompt(self._get(row, "prompt")) + answer
        _check_order(messages)
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRow("no_assistant", "no assistant turn to learn from")
        return Row(messages=messages, expected_answer=self._sft_answer(row, messages))

    def _sft_answer(self, row: dict[str, Any], messages: list[Message]) -> str | None:
        """What an evaluation compares with; a row without one is still good to learn from."""
        name = self._find(row, "expected_answer")
        text = row[name] if name is not None else messages[-1]["content"]
        if not isinstance(text, str):
            return None
        if self.answer_pattern is None:
            return text if name is not None else None
        return _search(self.answer_pattern, text)

    def _dpo(self, row: dict[str, Any]) -> Row:
        chosen, rejected = self._get(row, "chosen"), self._get(row, "rejected")
        if _is_conversation(chosen) and _is_conversation(rejected):
            prompt, good, bad = self._shared_prompt(chosen, rejected)
        else:
            prompt = self._as_prompt(self._get(row, "prompt"))
            good, bad = self._as_answer(chosen, "chosen"), self._as_answer(rejected, "rejected")
        _check_answer(good, "chosen")
        _check_answer(bad, "rejected")
        if good == bad:
            raise BadRow("same_pair", "chosen and rejected are the same")
        return Row(prompt=prompt, chosen=good, rejected=bad)

    def _kto(self, row: dict[str, Any]) -> Row:
        prompt = self._as_prompt(self._get(row, "prompt"))
        completion = self._as_answer(self._get(row, "completion"), "completion")
        label = self._get(row, "label")
        if not isinstance(label, bool):
            raise BadRow("wrong_type", f"label must be true or false, not {label!r}")
        _check_answer(completion, "completion")
        return Row(prompt=prompt, completion=completion, label=label)

    def _rl(self, row: dict[str, Any]) -> Row:
        by_messages = self.columns.messages is not None or self._find(row, "prompt") is None
        name = "messages" if by_messages and self._find(row, "messages") is not None else "prompt"
        prompt = self._as_prompt(self._get(row, name))
        _check_order(prompt)
        answer_name = self._find(row, "expected_answer")
        response_name = self._find(row, "response") if self.answer_pattern is not None else None
        source = answer_name or response_name
        if source is None:
            raise BadRow("no_expected_answer", "the row has no expected_answer, and no answer to find one in")
        answer = row[source]
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = json.dumps(answer)
        if not isinstance(answer, str):
            raise BadRow("wrong_type", f"{source} must be text or a number, not {type(answer).__name__}")
        if self.answer_pattern is not None:
            found = _search(self.answer_pattern, answer)
            if found is None:
                raise BadRow("no_expected_answer", f"answer_pattern finds nothing in {source}")
            answer = found
        used = {self._find(row, name), answer_name, "tools"}
        extra = {key: value for key, value in row.items() if key not in used}
        return Row(prompt=prompt, expected_answer=answer.strip(), extra=extra)

    def _document(self, row: dict[str, Any]) -> Row:
        text = self._get(row, "text")
        if not isinstance(text, str):
            raise BadRow("wrong_type", f"text must be text, not {type(text).__name__}")
        if not text or text.isspace():
            raise BadRow("empty_text", "nothing but space")
        return Row(text=text)

    def _shared_prompt(self, chosen: Any, rejected: Any) -> tuple[list[Message], list[Message], list[Message]]:
        """Two whole conversations: what they share up to an assistant turn is the prompt."""
        good, bad = self._messages(chosen, "chosen"), self._messages(rejected, "rejected")
        length = 0
        while length < min(len(good), len(bad)) and good[length] == bad[length]:
            length += 1
        while length and not all(len(c) > length and c[length]["role"] == "assistant" for c in (good, bad)):
            length -= 1
        if not length:
            raise BadRow("bad_order", "chosen and rejected don't share a prompt that an assistant turn follows")
        return good[:length], good[length:], bad[length:]

    def _as_prompt(self, value: Any) -> list[Message]:
        """Text is a user turn; messages must end with a user's turn or a tool result."""
        if isinstance(value, str):
            return [{"role": "user", "content": value}]
        messages = self._messages(value, "prompt")
        if messages[-1]["role"] not in ("user", "tool"):
            raise BadRow("bad_order", f"the prompt ends with a turn of '{messages[-1]['role']}'")
        return messages

    def _as_answer(self, value: Any, name: str) -> list[Message]:
        """Text is an assistant turn."""
        return self._messages([{"role": "assistant", "content": value}] if isinstance(value, str) else value, name)

    def _messages(self, value: Any, name: str) -> list[Message]:
        if not isinstance(value, list):
            raise BadRow("wrong_type", f"{name} must be a list of messages, not {type(value).__name__}")
        if not value:
            raise BadRow("empty_conversation", f"{name} is empty")
        thoughts = self.split_thoughts
        return [
            message if is_plain(message, thoughts) else read_message(message, f"{name}[{i}]", thoughts)
            for i, message in enumerate(value)
        ]

    def _find(self, row: dict[str, Any], field_name: str) -> str | None:
        """The key of the row that holds this field."""
        for name in self._names[field_name]:
            if row.get(name) is not None:
                return name
        return None

    def _get(self, row: dict[str, Any], field_name: str) -> Any:
        name = self._find(row, field_name)
        if name is None:
            raise BadRow("missing_field", f"no field {' or '.join(map(repr, self._names[field_name]))}")
        return row[name]

    @cached_property
    def _read(self) -> Callable[[dict[str, Any]], Row]:
        return {"sft": self._sft, "dpo": self._dpo, "kto": self._kto, "rl": self._rl}[self.method]

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        """Field -> the keys that it may stand under."""
        named = vars(self.columns)
        return {field: usual if named[field] is None else (named[field],) for field, usual in USUAL_NAMES.items()}


def _check_order(messages: list[Message]) -> None:
    """A tool result must answer an assistant turn; the template groups it under a user header."""
    previous = None
    for index, message in enumerate(messages):
        if message["role"] == "tool" and previous not in ("assistant", "tool"):
            raise BadRow("bad_order", f"turn {index} is a tool result that follows no assistant turn")
        previous = message["role"]


def _check_answer(messages: list[Message], name: str) -> None:
    """One turn: a trainer learns from every token of an answer, and a tool's result is not the model's."""
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise BadRow("bad_order", f"{name} must be one assistant turn, not {', '.join(roles)}")


def _check_tool_markup(row: Row) -> None:
    """Tool calls, structured or as text, in a row that never says which tools there are."""
    if row.tools:
        return
    messages = row.messages or row.prompt + row.chosen + row.rejected + row.completion
    for message in messages:
        if "<tool_call>" in message["content"] or (
            len(message) > 2 and (message.get("tool_calls") or "<tool_call>" in message.get("reasoning_content", ""))
        ):
            break
    else:
        return
    if not any("# Tools" in message["content"] for message in messages):
        raise BadRow("tool_call_without_tools", "a tool call, but no tools and no '# Tools' header")


def _is_conversation(value: Any) -> bool:
    """A list of messages that doesn't begin with the assistant: prompt and answer in one."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and first.get("role") != "assistant"


def _search(pattern: str, text: str) -> str | None:
    """The last match: a final answer stands at the end."""
    found = [match.group(1) for match in re.finditer(pattern, text, re.MULTILINE)]
    return found[-1].strip() if found and found[-1] is not None else None
