"""The shipped template in plain Python: the same text as templates/nemotron3.jinja for the rows that it takes.

It knows nothing of control tokens in the content: whoever encodes its text counts them and gives rows with more than
the template's own to the reference. Rows of other kinds (tools, a thought inside the content) are declined with None.
`ShardEncoder` compares it with the reference on a sample of every shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemotron_recipes.data.template import BUILTIN, Rendered

Renderer = Callable[[list[dict[str, Any]], list[dict[str, Any]], bool, bool], "Rendered | None"]


def fast_renderer(source: str, control: tuple[str, ...]) -> Renderer | None:
    """The fast way to render this template, if there is one. `control`: the tokenizer's control tokens."""
    if source != BUILTIN["nemotron3"].read_text(encoding="utf-8"):
        return None
    return _Nemotron3(control).render


class _Nemotron3:
    def __init__(self, control: tuple[str, ...]):
        literals = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_response>", "</tool_response>")
        is_control = {literal: int(literal in control) for literal in literals}
        self._turn = is_control["<|im_start|>"] + is_control["<|im_end|>"]
        self._start = is_control["<|im_start|>"]
        self._think = is_control["<think>"]
        self._thought = self._think + is_control["</think>"]
        self._response = is_control["<tool_response>"] + is_control["</tool_response>"]

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], add_prompt: bool, thinking: bool
    ) -> Rendered | None:
        if tools:
            return None
        system = ""
        turns = messages
        if messages and messages[0]["role"] == "system":
            system, turns = messages[0]["content"], messages[1:]
        last_user = max((i for i, m in enumerate(turns) if m["role"] == "user"), default=-1)
        reasons = any("reasoning_content" in m for m in turns)
        parts = ["<|im_start|>system\n", system, "<|im_end|>\n"]
        controls = self._turn
        length = len(system) + 30
        generated: list[tuple[int, int]] = []
        before = ""
        for index, message in enumerate(turns):
            role, content = message["role"], message["content"]
            if role == "assistant":
                reasoning = message.get("reasoning_content", "")
                if message.get("tool_calls") or "think>" in content or "think>" in reasoning:
                    return None
                past = index < last_user
                opening = "<|im_start|>assistant\n<think></think>"
                if not reasoning:
                    body = content
                elif past:
                    body = "\n" + content
                else:
                    opening, body = "<|im_start|>assistant\n<think>\n", reasoning + "\n</think>\n" + content
                controls += self._turn + self._thought
                body = body.rstrip()
                start = length + len(opening)
                length = start + len(body) + 10
                if message.get("weight") != 0 and not (reasons and past):
                    generated.append((start, length))
                parts += (opening, body, "<|im_end|>\n")
                length += 1
            elif role == "tool":
                first = before != "tool"
                last = index + 1 == len(turns) or turns[index + 1]["role"] != "tool"
                head = "<|im_start|>user\n<tool_response>\n" if first else "<tool_response>\n"
                tail = "\n</tool_response>\n<|im_end|>\n" if last else "\n</tool_response>\n"
                controls += self._response + (self._turn if first and last else self._start if first else 0)
                controls += self._turn - self._start if last and not first else 0
                parts += (head, content, tail)
                length += len(head) + len(content) + len(tail)
            else:
                head = f"<|im_start|>{role}\n"
                controls += self._turn
                parts += (head, content, "<|im_end|>\n")
                length += len(head) + len(content) + 11
            before = role
        if add_prompt:
            parts.append("<|im_start|>assistant\n" + ("<think>\n" if thinking else "<think></think>"))
            controls += self._start + (self._think if thinking else self._thought)
        return Rendered("".join(parts), tuple(generated), None, False, controls)
