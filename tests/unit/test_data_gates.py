"""What each gate that judges one row keeps and drops, and why."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import nemotron_recipes.data.gates
from nemotron_recipes.data.gate_settings import (
    Contamination,
    GateSettings,
    Judge,
    Language,
    Length,
    OwnGate,
    Pii,
    Provenance,
    Quality,
    Repetition,
    Structure,
)
from nemotron_recipes.data.gates import Candidate, Drop, Swept, duplicates
from nemotron_recipes.data.gates.build import build_gates
from nemotron_recipes.data.gates.pii import redactor
from nemotron_recipes.data.settings import read_settings
from nemotron_recipes.errors import UserError
from tests.helpers.data_prep import chat, run_prepare, write_rows
from tests.helpers.gates import TALK, Turn, assistant, candidate, judge, reason, user

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("settings", "fields", "expected"),
    [
        ({}, {"license": "MIT", "source": "own", "customer_data": False}, None),
        ({}, {"license": " ", "source": "own", "customer_data": False}, "missing_license"),
        ({}, {"license": 3, "source": "own", "customer_data": False}, "missing_license"),
        ({"licenses": ["MIT"]}, {"license": "GPL", "source": "own", "customer_data": False}, "license_not_allowed"),
        ({}, {"license": "MIT", "customer_data": False}, "missing_source"),
        ({}, {"license": "MIT", "source": "own"}, "missing_customer_data"),
        ({}, {"license": "MIT", "source": "own", "customer_data": "no"}, "missing_customer_data"),
        ({}, {"license": "MIT", "source": "own", "customer_data": True}, "customer_data"),
        ({"customer_data": "keep"}, {"license": "MIT", "source": "own", "customer_data": True}, None),
        ({"license_field": "meta.license", "source_field": None, "customer_data_field": None},
         {"meta": {"license": "MIT"}}, None),
    ],
)  # fmt: skip
def test_provenance(settings: dict[str, Any], fields: dict[str, Any], expected: str | None) -> None:
    assert reason(GateSettings(provenance=Provenance(**settings)), candidate(**fields)) == expected


@pytest.mark.parametrize(
    ("settings", "turns", "expected"),
    [
        ({}, TALK, None),
        ({}, [{"role": "system", "content": "s"}, *TALK], None),
        ({}, [assistant("Hello."), *TALK], "not_alternating"),
        ({}, [*TALK, assistant("More.")], "not_alternating"),
        ({"alternating": False}, [*TALK, assistant("More.")], None),
        ({}, [*TALK, user("Thanks.")], "ends_without_answer"),
        ({"ends_with_assistant": False}, [*TALK, user("Thanks.")], None),
        ({"min_turns": 3}, TALK, "too_few_turns"),
        ({"max_turns": 1}, TALK, "too_many_turns"),
        ({"system": "required"}, TALK, "system_missing"),
        ({"system": "forbidden"}, [{"role": "system", "content": "s"}, *TALK], "system_present"),
        ({}, [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": {}}}]),
              {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, assistant("b")], None),
    ],
)  # fmt: skip
def test_structure(settings: dict[str, Any], turns: list[Turn], expected: str | None) -> None:
    one = candidate({"messages": turns, "tools": [{"name": "f"}]})
    assert reason(GateSettings(structure=Structure(**settings)), one) == expected


@pytest.mark.parametrize(
    ("where", "missing", "fields", "expected"),
    [
        (["score >= 7"], "drop", {"score": 7}, None),
        (["score>=7"], "drop", {"score": 6.9}, "low_quality"),
        (["score >= 7", "meta.toxicity < 0.5"], "drop", {"score": 8, "meta": {"toxicity": 0.5}}, "low_quality"),
        (["score >= 7"], "drop", {}, "missing_quality"),
        (["score >= 7"], "drop", {"score": True}, "missing_quality"),
        (["score >= 7"], "drop", {"score": "9"}, "missing_quality"),
        (["score >= 7"], "keep", {}, None),
        (["score != 0"], "drop", {"score": 0.0}, "low_quality"),
        (["score > -1e-3"], "drop", {"score": 0}, None),
    ],
)
def test_quality(where: list[str], missing: Any, fields: dict[str, Any], expected: str | None) -> None:
    assert reason(GateSettings(quality=Quality(where, missing)), candidate(**fields)) == expected


def test_judges() -> None:
    settings = GateSettings(judge=Judge(min=0.7))
    assert reason(settings, candidate(agreement=0.7)) is None
    assert reason(settings, candidate(agreement=0.69)) == "judges_disagree"
    assert reason(settings, candidate()) == "missing_agreement"


@pytest.mark.parametrize(
    ("settings", "lengths", "expected"),
    [
        ({"min_tokens": 5}, (4,), "too_short"),
        ({"min_tokens": 5}, (4, 5), None),  # the longest sequence counts
        ({"max_tokens": 5}, (6,), "too_long"),
        ({"min_answer_chars": 6}, (9,), "answer_too_short"),  # "Four."
        ({"max_answer_chars": 5}, (9,), None),
        ({"max_answer_chars": 4}, (9,), "answer_too_long"),
    ],
)
def test_length(settings: dict[str, Any], lengths: tuple[int, ...], expected: str | None) -> None:
    assert reason(GateSettings(length=Length(**settings)), candidate(), lengths) == expected


def test_the_length_of_a_pair_is_prompt_and_longest_answer() -> None:
    pair = candidate({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo")
    assert reason(GateSettings(length=Length(max_tokens=9)), pair, (4, 5, 1)) is None
    assert reason(GateSettings(length=Length(max_tokens=8)), pair, (4, 5, 1)) == "too_long"


def test_repetition() -> None:
    settings = GateSettings(repetition=Repetition(ngram=3, max_share=0.3))
    looping = candidate({"messages": [user("a"), assistant("I am not sure. " * 20)]})
    verdict = judge(settings, looping)
    assert verdict.reason == "repetitive"
    assert redactor([])(verdict.example) == "95% repeated; 20 times: I am not"
    assert reason(settings, candidate({"messages": [user("I am not sure. " * 20), assistant("Why?")]})) is None
    assert reason(settings, candidate({"messages": [user("a"), assistant("我不知道。" * 20)]})) == "repetitive"
    assert reason(settings, candidate({"messages": [user("a"), assistant("", reasoning_content="hm hm " * 20)]}))


GERMAN = "Das Wetter in Bonn ist heute schön, und morgen soll es regnen. Nimm also einen Schirm mit."
ENGLISH = "The weather in Bonn is fine today, and tomorrow it is said to rain. So take an umbrella."


def test_language() -> None:
    settings = GateSettings(language=Language(["en"]))
    assert reason(settings, candidate(chat("How is the weather?", ENGLISH))) is None
    assert reason(settings, candidate(chat("Wie ist das Wetter?", GERMAN))) == "other_language"
    assert reason(settings, candidate(chat("Wie?", "Gut."))) is None  # too short to say
    unsure = GateSettings(language=Language(["en", "de"], min_probability=1.0))
    assert reason(unsure, candidate(chat(ENGLISH, GERMAN))) == "language_unclear"


def test_contamination(tmp_path: Path) -> None:
    question = "A train leaves Bonn at nine and drives eighty kilometres per hour: when is it in Köln?"
    rows = [
        {"question": question, "answer": "At 9:20."},
        {"question": "Name all the nine planets of our own sun.", "id": 1},
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = GateSettings(contamination=Contamination(["eval"]))

    def check(text: str) -> Any:
        return judge(settings, candidate(chat(text, "I see.")), (), (tmp_path / "eval.jsonl",))

    verdict = check("Tell me: a TRAIN leaves Bonn, at nine, and drives eighty kilometres per hour — when?")
    assert verdict.reason == "contaminated"
    assert "eval.jsonl, line 1: a TRAIN leaves Bonn, at nine" in redactor([])(verdict.example)
    assert check("A train leaves Bonn at nine and drives ninety kilometres per hour.") is None
    assert check("Name all the nine planets of our own sun!").reason == "contaminated"  # a short item counts whole
    assert check("Name all the nine planets") is None
    assert (
        judge(settings, candidate(chat("x", question)), (), (tmp_path,)).reason == "contaminated"
    )  # a folder; an answer
    named = GateSettings(contamination=Contamination(["eval"], fields=["answer"]))
    with pytest.raises(UserError, match="no text of 8 words"):
        judge(named, candidate(), (), (tmp_path / "eval.jsonl",))


def test_contamination_notices_a_changed_file(tmp_path: Path) -> None:
    file = tmp_path / "eval.jsonl"
    file.write_text('{"q": "one two three four five six seven eight"}\n')
    gate = build_gates(GateSettings(contamination=Contamination(["x"])), (file,)).rows[0]
    before = gate.key
    file.write_text('{"q": "one two three four five six seven nine"}\n')
    assert gate.key != before


@pytest.mark.parametrize("content", ["{", None])
def test_an_unreadable_evaluation_file(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "eval.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match="can't be read"):
        judge(GateSettings(contamination=Contamination(["x"])), candidate(), (), (file,))


@dataclass(frozen=True)
class NoShouting:
    """Somebody's own gate."""

    limit: float = 0.5
    name = "no_shouting"
    key = 1

    def open(self) -> None:
        pass

    def check(self, candidate: Candidate) -> Any:
        text = candidate.row.messages[-1]["content"]
        return Drop("shouting", text) if sum(map(str.isupper, text)) > self.limit * len(text) else None

    def check_tokens(self, candidate: Candidate, sequences: Any) -> None:
        return None


def test_a_gate_of_ones_own() -> None:
    own = OwnGate("tests.unit.test_data_gates:NoShouting", {"limit": 0.8})
    assert reason(GateSettings(own=[own]), candidate(chat("a", "LOUD"))) == "shouting"
    assert reason(GateSettings(own=[own]), candidate(chat("a", "LOUd"))) is None


@pytest.mark.parametrize(
    ("gate", "options", "message"),
    [
        ("tests.unit.test_data_gates:NoShouting", {"limt": 1}, "limt"),
        ("tests.unit.test_data_gates:Nothing", None, "can't be loaded"),
        ("no_such_package:Gate", None, "can't be loaded"),
        ("no_such_entry_point", None, "no installed package has the gate"),
        ("builtins:object", None, "is no RowGate: it has no name, key, open"),
    ],
)
def test_own_gates_that_can_not_be_had(gate: str, options: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_gates(GateSettings(own=[OwnGate(gate, options)]))


class Faulty(NoShouting):
    """Does what it was told to do wrong."""

    def __init__(self, fault: Any):
        super().__init__(0.5)
        self.fault = fault

    def check(self, candidate: Candidate) -> Any:
        return 1 / 0 if self.fault == "raises" else self.fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", "the gate 'no_shouting' failed: ZeroDivisionError: division by zero"),
        ("drop it", "check gives a str that is no verdict: 'drop it'"),
        (True, "check gives a bool that is no verdict"),
    ],
)
def test_an_own_gate_with_a_fault_is_named(fault: Any, message: str) -> None:
    own = OwnGate("tests.unit.test_data_gates:Faulty", {"fault": fault})
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        judge(GateSettings(own=[own]), candidate())
    if fault == "raises":
        assert "test_data_gates.py, line" in str(caught.value) and "in check" in str(caught.value)


class FaultyCorpus:
    """A gate over all rows that does what it was told to do wrong."""

    name, key, width = "order", 1, 4

    def __init__(self, fault: str, given: Any = None):
        self.fault, self.given = fault, given
        if fault == "width":
            self.width = given
        if fault == "made":
            raise ValueError("no such model")

    def signature(self, candidate: Candidate, sequences: Any) -> Any:
        return self.given if self.fault == "signature" else b"1234"

    def sweep(self, corpus: Any, scratch: Path) -> Any:
        return [1 / 0] if self.fault == "raises" else self.given if self.fault == "sweep" else []


@pytest.mark.parametrize(
    ("fault", "given", "message"),
    [
        ("made", None, "FaultyCorpus can't be made (check data.gates.own.0.options): ValueError: no such model"),
        ("raises", None, "the gate 'order' failed: ZeroDivisionError"),
        ("width", -1, "its width is -1"),
        ("signature", "abcd", "signature gives str"),
        ("signature", b"abc", "signature gives bytes of 3"),
        ("sweep", 7, "the gate 'order' failed: TypeError: 'int' object is not iterable"),
        ("sweep", ["row 1"], "sweep gives 'row 1'"),
        ("sweep", [Swept(0, "")], "sweep gives Swept(index=0, reason=''"),
        ("sweep", [Swept(1, "odd"), Swept(0, "odd")], "sweep gives row 0 after row 1, of 2"),
        ("sweep", [Swept(2, "odd")], "sweep gives row 2 after row -1, of 2"),
    ],
)
def test_an_own_corpus_gate_with_a_fault_is_named(fault: str, given: Any, message: str, tmp_path: Path) -> None:
    gate = {"gate": "tests.unit.test_data_gates:FaultyCorpus", "options": {"fault": fault, "given": given}}
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a", "b"), chat("c", "d")])
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        run_prepare(tmp_path / "out", [rows], gates={"own": [gate]})
    if fault in ("made", "raises"):
        assert "test_data_gates.py, line" in str(caught.value)


def test_an_installed_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting-1.dist-info").mkdir()
    (tmp_path / "shouting-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1\n")
    (tmp_path / "shouting-1.dist-info" / "entry_points.txt").write_text(
        "[nemotron_recipes.gates]\nshouting = tests.unit.test_data_gates:NoShouting\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reason(GateSettings(own=[OwnGate("shouting")]), candidate(chat("a", "LOUD"))) == "shouting"
    with pytest.raises(UserError, match="did you mean 'shouting'"):
        build_gates(GateSettings(own=[OwnGate("shoutin")]))


def test_the_order_is_that_of_the_settings() -> None:
    gates = build_gates(GateSettings(pii=Pii(), structure=Structure(), judge=Judge(), length=Length(1)))
    assert [gate.name for gate in gates.rows] == ["structure", "judge", "length", "pii"]


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"pi": {}}, "did you mean 'pii'"),
        ({"pii": {"actoin": "drop"}}, "did you mean 'action'"),
        ({"pii": {"action": "remove"}}, "'remove' is not valid"),
        ({"pii": {"kinds": ["emial"]}}, "did you mean 'email'"),
        ({"pii": {"phone_region": "Germany"}}, "no ISO 3166 code"),
        ({"quality": {"where": ["score => 7"]}}, "is not a condition"),
        ({"quality": {"where": []}}, "at least 1"),
        ({"length": {}}, "no limit"),
        ({"length": {"min_tokens": 9, "max_tokens": 8}}, "min_tokens 9 is above max_tokens 8"),
        ({"language": {"allow": ["ger"]}}, "not a known language"),
        ({"near_duplicates": {"threshold": 0.2}}, "between 0.5 and 1"),
        ({"contamination": {"files": ["x"], "ngram": 3}}, "8 or more"),
        ({"own": [{"gate": "a b"}]}, "names no gate"),
        ({"own": [{"gate": "a", "options": 1}]}, "a section is expected"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(gates: dict[str, Any], message: str) -> None:
    tree = {"sources": [{"path": "x", "split": "train"}], "tokenizer": "tiny", "gates": gates}
    with pytest.raises(UserError, match=message):
        read_settings(tree, "sft")


def test_repetition_needs_answers() -> None:
    tree = {"sources": [{"path": "x", "split": "train"}], "tokenizer": "tiny", "gates": {"repetition": {}}}
    with pytest.raises(UserError, match="no meaning for rl"):
        read_settings(tree, "rl")


def test_every_reason_is_documented() -> None:
    package = Path(str(nemotron_recipes.data.gates.__file__)).parent
    source = "".join(path.read_text(encoding="utf-8") for path in package.glob("*.py"))
    used = set(re.findall(r'Drop\(\s*"(\w+)"', source)) | {duplicates.DUPLICATE, duplicates.IN_TRAINING}
    used |= {duplicates.NEAR_DUPLICATE, duplicates.NEAR_TRAINING}
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = page[page.index("## Gates") :]
    assert used - set(re.findall(r"`(\w+)`", table)) == set()
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert [re.findall(r"`(\w+)`", line)[0] for line in rows[: len(fields(GateSettings))]] == [
        field.name for field in fields(GateSettings)
    ]
    for line, field in zip(rows, fields(GateSettings), strict=False):
        section = get_args(get_type_hints(GateSettings)[field.name])[0]
        section = OwnGate if field.name == "own" else section
        assert all(f"`{setting.name}" in line for setting in fields(section)), field.name
