"""Every line of the policy table in docs/data.md, tried from a file of rows to the counts and what is learned."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from nemotron_recipes.data.packed import PackedSplit
from nemotron_recipes.errors import UserError
from tests.helpers.data_prep import TEMPLATE, chat, encoder, rows_of, run_prepare, tiny_folder

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
END = "<|im_end|>"
U, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
AS_TEXT = {"function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [{"name": "f"}]
GOOD = chat("What?", "That.")


def talk(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


def said(text: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


@dataclass
class Line:
    """A line of the table: rows beside which one good row stands, and what becomes of them."""

    rows: list[Any]  # bytes: as they are
    dropped: dict[str, int] = field(default_factory=dict)
    learned: list[str] = field(default_factory=list)  # what is learned of the rows, in the order of their places
    method: str = "sft"
    good: Any = field(default_factory=lambda: GOOD)
    settings: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=lambda: {"split": "train"})
    facts: dict[str, int] = field(default_factory=dict)  # of the total
    template: str = TEMPLATE
    tokenizer: str = "tiny"


OF_40 = 23  # of the forty rows below those whose hash is less than a half
DPO = {"prompt": "q", "chosen": "a", "rejected": "b"}
DOCUMENT = {"chat_template": None, "end_of_document": "</s>"}
LINES: dict[str, Line] = {
    "a line that is no JSON, has `NaN`, or is nested too deeply": Line(
        [b'{"messages": [', b'{"messages": NaN}', b"[" * 5000 + b"]" * 5000], {"invalid_json": 3}
    ),
    "a line that is no UTF-8": Line([b'{"messages": "\xff"}'], {"invalid_utf8": 1}),
    "a line of more than 8 MiB (two million tokens or so)": Line(
        [b'{"messages": "' + b"x" * (8 << 20) + b'"}'], {"line_too_long": 1}
    ),
    'half of a surrogate pair (`"\\ud83d"`)': Line([rb'{"prompt": "\ud83d", "response": "b"}'], {"lone_surrogate": 1}),
    "JSON, but no object": Line([[1], "text", 1], {"not_an_object": 3}),
    "a field of the wrong type (`messages` is text, `label` is 1)": Line([{"messages": "text"}], {"wrong_type": 1}),
    "a field is missing or null": Line([{"response": "a"}, {"prompt": "a", "response": None}], {"missing_field": 2}),
    "no message at all": Line([talk()], {"empty_conversation": 1}),
    "a role other than system, developer (= system), user, assistant, tool": Line(
        [talk(U, A, {"role": "critic", "content": "C"})], {"unknown_role": 1}
    ),
    "`content: null` of an assistant with tool calls or reasoning, of a system turn or a tool result": Line(
        [talk({"role": "system", "content": None}, U, said(None, reasoning_content="T"))],
        learned=["T\n</think>" + END],
    ),
    "`content: null` of a user": Line([talk({"role": "user", "content": None}, A)], {"null_content": 1}),
    "`content` as a list of text parts": Line(
        [talk(U, said([{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]))], learned=["AB" + END]
    ),
    "`content` with an image or another part": Line(
        [talk({"role": "user", "content": [{"type": "image_url"}]}, A)], {"non_text_content": 1}
    ),
    "an assistant turn that says nothing": Line([talk(U, said(" \n"))], {"empty_assistant": 1}),
    "no assistant turn (sft)": Line([talk(U)], {"no_assistant": 1}),
    "`weight: 0`": Line([talk(U, said("A", weight=0), U, said("B"))], learned=["B" + END]),
    "`weight` other than 0 and 1": Line([talk(U, said("A", weight=0.5))], {"bad_weight": 1}),
    "nothing left to learn (every turn has weight 0)": Line([talk(U, said("A", weight=0))], {"nothing_to_train": 1}),
    "`<think>...</think>` at the start of an answer": Line(
        [talk(U, said("<think>\nT\n</think>\nA"))], learned=["T\n</think>\nA" + END]
    ),
    "a conversation with reasoning": Line(
        [talk(U, said("A", reasoning_content="T"), U, said("B"))],
        learned=["T\n</think>\nA" + END, "B" + END],
        facts={"sequences_written": 3},
    ),
    "tool arguments, or `tools`, as JSON text": Line(
        [
            talk(
                U, said("A", tool_calls=[{"function": {"name": "f", "arguments": '{"x": 1}'}}]), tools=json.dumps(TOOLS)
            )
        ],
        learned=["A\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>\n" + END],
        settings={"pack_size": 2048},
    ),
    "a tool call without a name or with broken arguments": Line(
        [
            talk(U, said("A", tool_calls=[{"function": {"arguments": {}}}]), tools=TOOLS),
            talk(U, said("A", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), tools=TOOLS),
        ],
        {"bad_tool_call": 2},
    ),
    "`tools` that is no list of named functions": Line([talk(U, A, tools=[{"type": "function"}])], {"bad_tools": 1}),
    "a tool call (also as text), but neither `tools` nor a `# Tools` header": Line(
        [talk(U, said("A", tool_calls=[CALL])), talk(U, said("<tool_call>"))], {"tool_call_without_tools": 2}
    ),
    "a tool result that follows no assistant turn; a prompt that ends with the assistant; an answer of several turns "
    "(dpo, kto)": Line(
        [DPO | {"prompt": [U, A]}, DPO | {"prompt": [U], "chosen": [A, U, A]}], {"bad_order": 2}, method="dpo", good=DPO
    ),
    "`chosen` equals `rejected`": Line([DPO | {"rejected": "a"}], {"same_pair": 1}, method="dpo", good=DPO),
    "rl without `expected_answer`, or where the pattern finds none (its last match counts)": Line(
        [{"prompt": "q"}, {"prompt": "q", "expected_answer": "none"}],
        {"no_expected_answer": 2},
        method="rl",
        good={"prompt": "q", "expected_answer": "#1 #2"},
        settings={"answer_pattern": "#([0-9])"},
    ),
    "a control token (`<\\|im_end\\|>`, `<think>`, ...) inside any text": Line(
        [talk({"role": "user", "content": END}, said(f"It is {END}, <think> and <s>."))],
        learned=[f"It is {END}, <think> and <s>." + END],
    ),
    "... where the tokenizer can't keep it as text": Line(
        [talk(U, said(f"It is {END}."))], {"control_text": 1}, tokenizer="metaspace"
    ),
    "the template raises an error for the row": Line(
        [talk(U, said("refuse me"))],
        {"template_refused": 1},
        template="{{ raise_exception('no') if messages[-1].content == 'refuse me' }}" + TEMPLATE,
    ),
    "longer than `data.pack_size` tokens": Line([chat("Q", "so " * 200)], {"overlong": 1}),
    "a document of nothing but space": Line(
        [{"text": " \n"}], {"empty_text": 1}, method="pretrain", good={"text": "So."}, settings=DOCUMENT
    ),
    "a source with `weight` 2.5, but for pretraining": Line(
        [chat(f"Q{n}", f"A{n}") for n in range(39)],
        source={"split": "train", "weight": 2.5},
        facts={"sequences_written": 2 * 40 + OF_40},
    ),
    "a source with `weight` 0.5": Line(
        [chat(f"Q{n}", f"A{n}") for n in range(39)],
        {"sampled_out": 40 - OF_40},
        source={"split": "train", "weight": 0.5},
    ),
    "no predefined `split`": Line([GOOD], learned=[], source={"split": None}, facts={"rows_written": 2}),
    "nothing left in the train split": Line([talk(U)], {"no_assistant": 1}, good=talk(U)),
}


def table() -> list[str]:
    """The first cells of the policy table."""
    part = DOCS.read_text(encoding="utf-8").partition("## Policy")[2].partition("\n## ")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1].strip() for line in part.splitlines() if line.startswith("| ")]
    return cells[1:]


def test_the_table_and_these_lines_are_the_same() -> None:
    assert table() == list(LINES)


@pytest.mark.parametrize("name", LINES)
def test_line(name: str, tmp_path: Path) -> None:
    line = LINES[name]
    file = tmp_path / "rows.jsonl"
    rows = [*line.rows, line.good]
    file.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    settings = {"pack_size": 256, "template": line.template, **line.settings}
    if line.tokenizer == "metaspace":
        settings["folder"] = metaspace(tmp_path)
    if name == "nothing left in the train split":
        with pytest.raises(UserError, match="nothing is left to train on: 2 rows read"):
            run_prepare(tmp_path / "out", [file], line.method, line.source, **settings)
        return
    _, metadata = run_prepare(tmp_path / "out", [file], line.method, line.source, **settings)
    total = metadata["total"]
    assert total["rows_dropped"] == line.dropped
    assert total["rows_read"] == len(rows) == total["rows_written"] + sum(line.dropped.values())
    assert {key: total[key] for key in line.facts} == line.facts
    if line.method == "sft" and line.learned:
        assert sorted([*line.learned, "That." + END]) == sorted(learned(tmp_path / "out"))
    if line.method == "rl":
        assert [row["expected_answer"] for row in rows_of(tmp_path / "out", "train")] == ["2"]
    listed = [json.loads(text)["reason"] for text in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    choices = {"overlong", "nothing_to_train", "sampled_out"}
    assert sorted(listed) == sorted(r for r, n in line.dropped.items() if r not in choices for _ in range(n))


def learned(output: Path) -> list[str]:
    """What each sequence has to learn."""
    found = []
    for pack in PackedSplit(output / "train"):
        bounds = [*pack["seq_start_id"].tolist(), len(pack["input_ids"])]
        for start, end in pairwise(bounds):
            ids = pack["input_ids"][start + 1 : end][pack["loss_mask"][start : end - 1] == 1]
            found.append(encoder()._tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    return found


def metaspace(folder: Path) -> Path:
    """A tokenizer that puts a space before a text, and so before every piece of one."""
    tokenizer = Tokenizer.from_file(str(tiny_folder() / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
