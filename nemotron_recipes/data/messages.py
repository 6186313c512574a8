"""One message, one list of tools: as they come -> normalised, or a `BadRow` that says what is wrong.

Normalised messages hold `role`, `content` (text), and for assistants `reasoning_content`, `tool_calls`
(`[{"function": {"name", "arguments": dict}}]`) and `weight` where they were given. docs/data.md lists every case.
"""

from __future__ import annotations

import json
import re
from typing import Any

Message = dict[str, Any]
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_NORMAL_ROLES = ("user", "system", "tool")
_OPENS_THOUGHT = re.compile(r"\s*<think>")
_LEADING_THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


class BadRow(Exception):
    """A row that can't be used. `reason` is one of the closed set in docs/data.md; `detail` is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def read_message(message: Any, where: str, split_thoughts: bool) -> Message:
    """The normalised message. `where` names it in errors; `split_thoughts`: a leading thought becomes reasoning."""
    if not isinstance(message, dict):
        raise BadRow("wrong_type", f"{where} must be an object, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow("unknown_role", f"{where} has role {role!r}; known: {', '.join(ROLES)}")
    role = ROLES[role]
    content = _text(message.get("content"), role, where)
    if role != "assistant":
        return {"role": role, "content": content}
    return _assistant(message, content, where, split_thoughts)


def is_plain(message: Any, split_thoughts: bool) -> bool:
    """Whether `read_message` would give just this back, as it does for nearly all: a known role and some text."""
    if type(message) is not dict or len(message) != 2:
        return False
    role, content = message.get("role"), message.get("content")
    if type(content) is not str:
        return False
    if role == "assistant":
        return bool(content) and not content.isspace() and not (split_thoughts and _OPENS_THOUGHT.match(content))
    return role in _NORMAL_ROLES


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """The list of tools, parsed where it is JSON text; null and blank text are none."""
    tools = _parsed(tools, "bad_tools", "tools")
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise BadRow("bad_tools", "tools must be a list")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("bad_tools", f"tools[{index}] has no name")
    return tools


def _assistant(message: dict[str, Any], content: str, where: str, split_thoughts: bool) -> Message:
    result: Message = {"role": "assistant", "content": content}
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise BadRow("wrong_type", f"{where}.reasoning_content must be text")
    if split_thoughts and not (reasoning or "").strip():
        reasoning, result["content"] = _split_thought(content)
    if reasoning and reasoning.strip():
        result["reasoning_content"] = reasoning
    calls = _tool_calls(message.get("tool_calls"), where)
    if calls:
        result["tool_calls"] = calls
    weight = message.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise BadRow("bad_weight", f"{where}.weight must be 0 or 1, not {weight!r}")
        result["weight"] = int(weight)
    if not result["content"].strip() and "reasoning_content" not in result and not calls:
        raise BadRow("empty_assistant", f"{where} says nothing")
    return result


def _split_thought(content: str) -> tuple[str | None, str]:
    """(reasoning, rest) of a text that begins with `<think>...</think>`, without the newlines that templates write."""
    match = _LEADING_THOUGHT.match(content)
    if match is None:
        return None, content
    thought = match.group(1).removeprefix("\n").removesuffix("\n")
    return thought, content[match.end() :].removeprefix("\n")


def _text(content: Any, role: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if role == "user":
            raise BadRow("null_content", f"{where}: a user turn without content")
        return ""
    if not isinstance(content, list):
        raise BadRow("wrong_type", f"{where}.content must be text, text parts or null, not {type(content).__name__}")
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRow("non_text_content", f"{where}.content has a part of type {kind!r}")
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise BadRow("bad_tool_call", f"{where}.tool_calls must be a list")
    result = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow("bad_tool_call", f"{where}.tool_calls[{index}] names no function")
        arguments = _parsed(function.get("arguments", {}), "bad_tool_call", f"{where}.tool_calls[{index}].arguments")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise BadRow("bad_tool_call", f"{where}.tool_calls[{index}].arguments is not an object")
        result.append({"function": {"name": function["name"], "arguments": arguments}})
    return result


def _parsed(value: Any, reason: str, where: str) -> Any:
    """JSON text is parsed; anything else is left as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(reason, f"{where} is not valid JSON") from None
