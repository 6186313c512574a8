"""The policy of docs/data.md, case by case."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import nemotron_recipes.data
from nemotron_recipes.data.cuts import cut_inputs
from nemotron_recipes.data.files import find_files
from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.readers import BLANK, read_shard
from tests.helpers.data_prep import chat, read_row

ROOT = Path(__file__).parents[2]
TOOL = {"type": "function", "function": {"name": "f"}}
U = {"role": "user", "content": "a"}
A = {"role": "assistant", "content": "b"}


def turns(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


def calling(function: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [function]}


BAD: list[tuple[str, str, Any]] = [
    ("not_an_object", "sft", ["a"]),
    ("not_an_object", "dpo", None),
    ("wrong_type", "sft", {"messages": "a"}),
    ("wrong_type", "sft", turns("a")),
    ("wrong_type", "sft", turns(U, {"role": "assistant", "content": 3})),
    ("wrong_type", "sft", turns(U, {**A, "reasoning_content": ["r"]})),
    ("wrong_type", "kto", {"prompt": "a", "completion": "b", "label": 1}),
    ("wrong_type", "kto", {"prompt": "a", "completion": "b", "label": "true"}),
    ("wrong_type", "rl", {"prompt": "a", "expected_answer": ["b"]}),
    ("wrong_type", "dpo", {"prompt": 1, "chosen": "b", "rejected": "c"}),
    ("missing_field", "sft", {"text": "a"}),
    ("missing_field", "sft", {"prompt": "a"}),
    ("missing_field", "dpo", {"prompt": "a", "chosen": "b"}),
    ("missing_field", "kto", {"prompt": "a", "completion": "b", "label": None}),
    ("empty_conversation", "sft", turns()),
    ("unknown_role", "sft", turns({"role": "function", "content": "a"}, A)),
    ("unknown_role", "sft", turns({"content": "a"}, A)),
    ("unknown_role", "sft", turns({"role": ["user"], "content": "a"}, A)),
    ("null_content", "sft", turns({"role": "user", "content": None}, A)),
    ("non_text_content", "sft", turns({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A)),
    ("non_text_content", "sft", turns({"role": "user", "content": [7]}, A)),
    ("empty_assistant", "sft", turns(U, {"role": "assistant", "content": None})),
    ("empty_assistant", "sft", turns(U, {"role": "assistant", "content": " \n"})),
    ("empty_assistant", "sft", turns(U, {"role": "assistant", "content": "<think></think>"})),
    ("no_assistant", "sft", turns(U)),
    ("bad_weight", "sft", turns(U, {**A, "weight": 0.5})),
    ("bad_weight", "sft", turns(U, {**A, "weight": True})),
    ("bad_tool_call", "sft", turns(U, calling({"function": {"arguments": {}}}), tools=[TOOL])),
    ("bad_tool_call", "sft", turns(U, calling({"function": {"name": "f", "arguments": "{"}}), tools=[TOOL])),
    ("bad_tool_call", "sft", turns(U, calling({"function": {"name": "f", "arguments": [1]}}), tools=[TOOL])),
    ("bad_tool_call", "sft", turns(U, calling("f"), tools=[TOOL])),
    ("bad_tool_call", "sft", turns(U, {**A, "tool_calls": "f"}, tools=[TOOL])),
    ("bad_tools", "sft", turns(U, A, tools="[")),
    ("bad_tools", "sft", turns(U, A, tools={"name": "f"})),
    ("bad_tools", "sft", turns(U, A, tools=[{"type": "function"}])),
    ("tool_call_without_tools", "sft", turns(U, calling({"function": {"name": "f"}}))),
    ("tool_call_without_tools", "sft", chat("a", "<tool_call>\n<function=f>\n</function>\n</tool_call>")),
    ("tool_call_without_tools", "dpo", {"prompt": "a", "chosen": "<tool_call>", "rejected": "c"}),
    ("bad_order", "sft", turns(U, {"role": "tool", "content": "r"}, A)),
    ("bad_order", "sft", turns({"role": "tool", "content": "r"}, A)),
    ("bad_order", "dpo", {"prompt": [U, A], "chosen": "b", "rejected": "c"}),
    ("bad_order", "dpo", {"prompt": "a", "chosen": [A, U, A], "rejected": "c"}),
    ("bad_order", "dpo", {"chosen": [U, A], "rejected": [{**U, "content": "other"}, A]}),
    ("bad_order", "kto", {"prompt": "a", "completion": [U], "label": True}),
    ("bad_order", "rl", {"messages": [U, A], "expected_answer": "1"}),
    ("same_pair", "dpo", {"prompt": "a", "chosen": "b", "rejected": [A]}),
    ("no_expected_answer", "rl", {"prompt": "a"}),
]


@pytest.mark.parametrize(("reason", "method", "row"), BAD)
def test_bad_rows(reason: str, method: str, row: Any) -> None:
    with pytest.raises(BadRow) as caught:
        read_row(row, method)
    assert caught.value.reason == reason
    assert caught.value.detail


def test_null_and_list_content() -> None:
    row = turns(
        {"role": "developer", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
        calling({"function": {"name": "f", "arguments": '{"x": 1}'}}),
        {"role": "tool", "content": None, "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}], "weight": 1},
        tools='[{"type": "function", "function": {"name": "f"}}]',
    )
    read = read_row(row)
    assert read.messages == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "c", "weight": 1},
    ]
    assert read.tools == [TOOL]


@pytest.mark.parametrize(
    ("content", "reasoning", "rest"),
    [
        ("<think>\nwhy\n</think>\nso", "why", "so"),
        ("<think>why</think>so", "why", "so"),
        ("\n<think>\n\nwhy\n\n</think>\n\nso", "\nwhy\n", "\nso"),
        ("<think></think>so", None, "so"),
        ("<think>\n\n</think>\nso", None, "so"),
        ("so <think>why</think>", None, "so <think>why</think>"),
        ("<think>never closed", None, "<think>never closed"),
    ],
)
def test_a_leading_thought_is_reasoning(content: str, reasoning: str | None, rest: str) -> None:
    message = read_row(chat("a", content)).messages[1]
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, rest)


def test_given_reasoning_leaves_the_content_alone() -> None:
    row = turns(U, {"role": "assistant", "content": "<think>x</think>b", "reasoning_content": "r"})
    message = read_row(row).messages[1]
    assert (message["reasoning_content"], message["content"]) == ("r", "<think>x</think>b")


def test_prompt_and_response_are_a_conversation() -> None:
    expected = [U, A]
    assert read_row({"prompt": "a", "response": "b"}).messages == expected
    assert read_row({"question": "a", "answer": "b"}).messages == expected
    assert read_row({"q": "a", "r": "b"}, columns={"prompt": "q", "response": "r"}).messages == expected
    assert read_row({"prompt": [U], "response": [A]}).messages == expected
    both = {"messages": [U, {**A, "content": "from messages"}], "prompt": "a", "response": "b"}
    assert read_row(both).messages[1]["content"] == "from messages"
    assert read_row(both, columns={"prompt": "prompt"}).messages == expected
    with pytest.raises(BadRow, match="missing_field: no field 'q'"):
        read_row({"prompt": "a", "response": "b"}, columns={"prompt": "q"})


def test_preference_rows_in_all_their_forms() -> None:
    good, bad = {**A, "content": "good"}, {**A, "content": "bad"}
    forms = [
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
        {"prompt": [U], "chosen": [good], "rejected": [{**bad, "weight": 0}]},
        {"prompt": "unused", "chosen": [U, good], "rejected": [U, bad]},
    ]
    for form in forms:
        row = read_row(form, "dpo")
        assert (row.prompt, row.chosen, row.rejected) == ([U], [good], [bad])
    row = read_row({"prompt": "a", "completion": "b", "label": False}, "kto")
    assert (row.prompt, row.completion, row.label) == ([U], [A], False)


def test_rl_rows_in_all_their_forms() -> None:
    row = read_row({"question": "a", "expected_answer": 42, "level": 3}, "rl")
    assert (row.prompt, row.expected_answer, row.extra) == ([U], "42", {"level": 3})
    row = read_row({"messages": [U], "expected_answer": " x "}, "rl")
    assert (row.prompt, row.expected_answer, row.extra) == ([U], "x", {})
    answer = "first #### 1\nthen\n#### 2,000\n"
    row = read_row({"question": "a", "answer": answer}, "rl", pattern="#### (.+)$")
    assert (row.expected_answer, row.extra) == ("2,000", {"answer": answer})
    with pytest.raises(BadRow, match="no_expected_answer"):
        read_row({"question": "a", "answer": "none"}, "rl", pattern="#### (.+)$")


def test_sft_rows_keep_the_answer_for_evaluations() -> None:
    assert read_row(chat("a", "It is\n#### 7"), pattern="#### (.+)$").expected_answer == "7"
    assert read_row(chat("a", "no pattern in it"), pattern="#### (.+)$").expected_answer is None
    assert read_row(chat("a", "b", expected_answer="7")).expected_answer == "7"


def test_a_tools_header_allows_tool_calls_in_prose() -> None:
    system = {"role": "system", "content": "# Tools\n<tools>...</tools>"}
    assert read_row(turns(system, U, {**A, "content": "<tool_call>..."})).messages[2]["content"] == "<tool_call>..."


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [}\n', "invalid_json"),
        (b'{"x": NaN}\n', "invalid_json"),
        (b"[" * 100_000 + b"\n", "invalid_json"),
        (b'{"x": "\xff"}\n', "invalid_utf8"),
        (b"\x00\n", "invalid_json"),
    ],
)
def test_lines_that_are_no_json(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{}\r\n\n  \n" + line + '{"x": "\u2028"}'.encode())
    (shard,) = cut_inputs(0, find_files(str(path)), None, 1 << 20)
    lines = [one for one in read_shard(shard) if one.value is not BLANK]
    assert [(one.number, one.bad.reason if one.bad else one.value) for one in lines] == [
        (1, {}),
        (4, reason),
        (5, {"x": "\u2028"}),
    ]


def test_every_reason_is_documented() -> None:
    package = Path(str(nemotron_recipes.data.__file__)).parent
    source = "".join(path.read_text(encoding="utf-8") for path in package.glob("*.py"))
    used = set(re.findall(r'BadRow\(\s*"(\w+)"', source)) | {"overlong", "nothing_to_train", "bad_tools"}
    documented = set(re.findall(r"(?:left out|counted): `(\w+)`", (ROOT / "docs" / "data.md").read_text("utf-8")))
    assert documented == used
