"""Personal data and credentials: what is found, what is not, and what becomes of the rows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from nemotron_recipes.data.gate_settings import GateSettings, Pii
from nemotron_recipes.data.gates import Candidate, Change, Drop, Note
from nemotron_recipes.data.gates.pii import PiiGate, luhn
from nemotron_recipes.data.packed import PackedSplit
from nemotron_recipes.data.rows import Row
from tests.helpers.data_prep import chat, run_prepare, tiny_folder, write_rows
from tests.helpers.gates import assistant, candidate, judge, user

PII = [
    ("email", "Write to jane.doe+news@mail.example.co.uk, please.", "Write to [EMAIL], please."),
    ("email", "josé@köln.example", "[EMAIL]"),
    (None, "user@localhost, @handle, a @ b.de, x@1.2, git@github:me", None),
    ("card", "Card 4111 1111 1111 1111 until 12/30", "Card [CARD] until 12/30"),
    ("card", "5500-0000-0000-0004", "[CARD]"),
    (None, "4111 1111 1111 1112", None),  # Luhn's sum is wrong
    (None, "0000000000000000 and 3.14159265358979323846", None),
    (None, "20261122001427 or 2000000-400000: no issuer's number, although the sum is right", None),
    ("card", "6011000990139424, 3530111333300000", "[CARD], [CARD]"),
    ("ip", "from 8.8.8.8, port 53", "from [IP], port 53"),
    ("ip", "from 2001:4860:4860::8888.", "from [IP]."),
    (None, "127.0.0.1, 10.0.0.1, 192.168.1.1, ::1, fe80::1, 300.1.1.1, 1.2.3.4.5, std::vector, 12:30:45", None),
    (None, "x[::2] a[1::3] b[2048::2] ::dead ff00:: 224.0.0.1", None),  # slices of Python, a C++ name, groups of hosts
    (None, "Chrome/120.0.0.0, version 8.2.4.44, v. 1.2.3.4, section 3.1.1.6", None),
    ("phone", "Call +49 30 901820 now", "Call [PHONE] now"),
    (None, "in 2024 there were 1234567 of 9876543", None),
    ("key", "AWS AKIAIOSFODNN7EXAMPLE.", "AWS [KEY]."),
    ("key", "token=ghp_" + "a1B2" * 9, "token=[KEY]"),
    ("key", "hf_" + "abcDEF12" * 4 + " is it", "[KEY] is it"),
    ("key", "nvapi-" + "abcd-EF_12" * 5, "[KEY]"),
    ("key", "sk-proj-" + "abcd1234" * 4, "[KEY]"),
    ("key", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nafter", "[KEY]\nafter"),
    ("key", "-----BEGIN PRIVATE KEY-----\ncut off", "[KEY]"),
    ("key", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N", "[KEY]"),
    (None, "risk-averse task-oriented sk-learn, the key is under the mat", None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "redacted"), PII, ids=[f"{n}-{kind}" for n, (kind, _, _) in enumerate(PII)])
def test_pii(kind: str | None, text: str, redacted: str | None) -> None:
    gate = PiiGate(Pii())
    assert {found for found, _ in gate.find(text)} == ({kind} if kind else set())
    assert gate.redact(text) == (redacted or text)


def test_pii_actions() -> None:
    row = {"messages": [user("mail a@b.example or c@d.example"), assistant("ok", reasoning_content="to a@b.example?")]}
    one = candidate(row)
    for action, kind in (("report", Note), ("redact", Change), ("drop", Drop)):
        verdict = judge(GateSettings(pii=Pii(action)), one)
        assert isinstance(verdict, kind)
        assert verdict.reason == "pii_email"
        assert verdict.example == "3 email; first in messages[0].content"
        assert "b.example" not in repr(verdict) or action == "redact"
    changed = judge(GateSettings(pii=Pii("redact")), one).row
    assert [m["content"] for m in changed.messages] == ["mail [EMAIL] or [EMAIL]", "ok"]
    assert changed.messages[1]["reasoning_content"] == "to [EMAIL]?"
    assert one.row.messages[0]["content"].startswith("mail a@b")  # the row itself is left alone


def test_pii_in_tool_calls_tools_and_extra_fields() -> None:
    call = {"function": {"name": "send", "arguments": {"to": ["a@b.example"], "n": 1}}}
    row = Row(messages=[user("x"), {"role": "assistant", "content": "", "tool_calls": [call], "weight": 1}],
              tools=[{"name": "send", "description": "as a@b.example"}], extra={"by": "a@b.example", "n": None},
              expected_answer="a@b.example")  # fmt: skip
    changed = judge(GateSettings(pii=Pii("redact")), Candidate(row, {}, "train")).row
    assert "b.example" not in repr(changed)
    assert changed.messages[1]["tool_calls"][0]["function"]["arguments"] == {"to": ["[EMAIL]"], "n": 1}
    assert changed.extra == {"by": "[EMAIL]", "n": None}


def test_pii_kinds_and_region() -> None:
    text = "8.8.8.8 or (030) 901820"
    assert PiiGate(Pii(kinds=["email"])).redact(text) == text
    assert PiiGate(Pii(kinds=["phone"])).redact(text) == text
    assert PiiGate(Pii(kinds=["phone"], phone_region="DE")).redact(text) == "8.8.8.8 or [PHONE]"


def test_luhn() -> None:
    assert luhn("79927398713")
    assert not any(luhn(f"7992739871{digit}") for digit in "012456789")


def test_redaction_keeps_masks_right(tmp_path: Path) -> None:
    """Redaction comes before the text is encoded: what is learned is the redacted answer, whole."""
    row = chat("Who is a@b.example?", "It is 8.8.8.8, paid with 4111 1111 1111 1111.")
    run_prepare(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", [row])], gates={"pii": {"action": "redact"}})
    (pack,) = PackedSplit(tmp_path / "out" / "train")
    labels = np.roll(pack["input_ids"], -1)[pack["loss_mask"] == 1]
    tokenizer = Tokenizer.from_file(str(tiny_folder() / "tokenizer.json"))
    assert tokenizer.decode(labels, skip_special_tokens=False) == "It is [IP], paid with [CARD].<|im_end|>"
    assert "[EMAIL]" in tokenizer.decode(pack["input_ids"]) and "b.example" not in tokenizer.decode(pack["input_ids"])


def test_no_report_quotes_what_is_private(tmp_path: Path) -> None:
    """Gates show the text of rows that they leave out; somebody's own gate, too."""
    filler = "It is said so. " * 3  # as much as brings a cut into the middle
    rows = [
        chat("Who?", "LOUDLY TO JANE@CORP.EXAMPLE: 4111 1111 1111 1111"),
        chat("a", "b" * 100),
        chat("Whom?", f"{filler}Pay 4111 1111 1111 1111"),
        chat("Where?", f"{filler}Ask JANE.DOE@CORP.EXAMPLE"),
        chat("Again?", "Ask Jane@Corp.example, card 4111 1111 1111 1111. " * 9),
    ]
    gate = {"gate": "tests.unit.test_data_gates:NoShouting", "options": {"limit": 0.2}}
    gates = {"own": [gate], "length": {"min_answer_chars": 90}, "repetition": {"ngram": 3, "max_share": 0.3}}
    run_prepare(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", rows)], gates=gates)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert b"Pay [CARD]" in written["data-card.md"] and b"9 times: Ask [EMAIL]" in written["data-card.md"]
    quotes = b"".join(content for name, content in written.items() if name.startswith(("data-card", "metadata")))
    assert not re.search(rb"jane|corp|4111|1111 ?1111", quotes, re.IGNORECASE)
