"""Gates that look at one row's fields, shape and length."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from nemotron_recipes.data.gate_settings import (
    Condition,
    Judge,
    Length,
    Provenance,
    Quality,
    Repetition,
    Structure,
    read_condition,
)
from nemotron_recipes.data.gates import Candidate, Drop, Note, Quote, Verdict
from nemotron_recipes.data.gates.text import answers, lookup, ngram_hashes, word_hashes, words, words_at

_COMPARE = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq, "!=": operator.ne
}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """A row gate without anything large, whose verdicts follow from its settings. Subclasses say what it checks."""

    settings: Any
    name: ClassVar[str] = ""

    @property
    def key(self) -> Any:
        return asdict(self.settings)

    def open(self) -> None:
        """Nothing to load."""

    def check(self, candidate: Candidate) -> Verdict:
        return None

    def check_tokens(self, candidate: Candidate, sequences: Sequence[np.ndarray]) -> Drop | Note | None:
        return None


class ProvenanceGate(Gate):
    """Reasons: missing_license, license_not_allowed, missing_source, missing_customer_data, customer_data."""

    settings: Provenance
    name = "provenance"

    def check(self, candidate: Candidate) -> Verdict:
        settings = self.settings
        if settings.license_field is not None:
            named = lookup(candidate.fields, settings.license_field)
            if not isinstance(named, str) or not named.strip():
                return Drop("missing_license", f"no text in {settings.license_field}")
            if settings.licenses is not None and named not in settings.licenses:
                return Drop("license_not_allowed", Quote("", named))
        if settings.source_field is not None:
            source = lookup(candidate.fields, settings.source_field)
            if not isinstance(source, str) or not source.strip():
                return Drop("missing_source", f"no text in {settings.source_field}")
        if settings.customer_data_field is not None:
            held = lookup(candidate.fields, settings.customer_data_field)
            if not isinstance(held, bool):
                return Drop("missing_customer_data", f"{settings.customer_data_field} is not true or false")
            if held and settings.customer_data == "drop":
                return Drop("customer_data", f"{settings.customer_data_field} is true")
        return None


class StructureGate(Gate):
    """Reasons: too_few_turns, too_many_turns, not_alternating, ends_without_answer, system_missing, system_present."""

    settings: Structure
    name = "structure"

    def check(self, candidate: Candidate) -> Verdict:
        settings = self.settings
        talk = candidate.row.messages or candidate.row.prompt
        roles = [message["role"] for message in talk]
        turns = [role for role in roles if role in ("user", "assistant")]
        if settings.min_turns is not None and len(turns) < settings.min_turns:
            return Drop("too_few_turns", f"{len(turns)} turns")
        if settings.max_turns is not None and len(turns) > settings.max_turns:
            return Drop("too_many_turns", f"{len(turns)} turns")
        if settings.alternating and not _alternates(roles):
            return Drop("not_alternating", Quote("", ", ".join(roles)))
        if settings.ends_with_assistant and candidate.row.messages and roles[-1] != "assistant":
            return Drop("ends_without_answer", f"the last turn is the {roles[-1]}'s")
        has_system = "system" in roles
        if settings.system == "required" and not has_system:
            return Drop("system_missing")
        if settings.system == "forbidden" and has_system:
            return Drop("system_present", Quote("", talk[roles.index("system")]["content"]))
        return None


class QualityGate(Gate):
    """Reasons: low_quality, missing_quality."""

    settings: Quality
    name = "quality"

    @cached_property
    def conditions(self) -> list[Condition]:
        return [condition for text in self.settings.where if (condition := read_condition(text)) is not None]

    def check(self, candidate: Candidate) -> Verdict:
        for condition in self.conditions:
            value = number(lookup(candidate.fields, condition.field))
            if value is None:
                if self.settings.missing == "drop":
                    return Drop("missing_quality", f"no number in {condition.field}")
            elif not _COMPARE[condition.op](value, condition.number):
                return Drop("low_quality", f"{condition.field} = {value:g}, not {condition.op} {condition.number:g}")
        return None


class JudgeGate(Gate):
    """Reasons: judges_disagree, missing_agreement."""

    settings: Judge
    name = "judge"

    def check(self, candidate: Candidate) -> Verdict:
        value = number(lookup(candidate.fields, self.settings.field))
        if value is None:
            return Drop("missing_agreement", f"no number in {self.settings.field}")
        if value < self.settings.min:
            return Drop("judges_disagree", f"{self.settings.field} = {value:g}, below {self.settings.min:g}")
        return None


class LengthGate(Gate):
    """Reasons: too_short, too_long, answer_too_short, answer_too_long."""

    settings: Length
    name = "length"

    def check(self, candidate: Candidate) -> Verdict:
        found = answers(candidate.row)
        size = sum(map(len, found))
        if found and self.settings.min_answer_chars is not None and size < self.settings.min_answer_chars:
            return Drop("answer_too_short", Quote(f"{size} characters: ", found[-1]))
        if found and self.settings.max_answer_chars is not None and size > self.settings.max_answer_chars:
            return Drop("answer_too_long", Quote(f"{size} characters: ", found[-1]))
        return None

    def check_tokens(self, candidate: Candidate, sequences: Sequence[np.ndarray]) -> Drop | Note | None:
        length = row_tokens(candidate, sequences)
        if self.settings.min_tokens is not None and length < self.settings.min_tokens:
            return Drop("too_short", f"{length} tokens")
        if self.settings.max_tokens is not None and length > self.settings.max_tokens:
            return Drop("too_long", f"{length} tokens")
        return None


class RepetitionGate(Gate):
    """Reason: repetitive. The share of an answer's word n-grams that occur before in it."""

    settings: Repetition
    name = "repetition"

    def check(self, candidate: Candidate) -> Verdict:
        for answer in answers(candidate.row):
            grams = ngram_hashes(word_hashes(words(answer)), self.settings.ngram)
            if not len(grams):
                continue
            values, first, counts = np.unique(grams, return_index=True, return_counts=True)
            share = 1 - len(values) / len(grams)
            if share > self.settings.max_share:
                start = int(first[np.lexsort((first, -counts))[0]])
                said = f"{share:.0%} repeated; {counts.max()} times: "
                return Drop("repetitive", Quote(said, answer, *words_at(answer, start, self.settings.ngram)))
        return None


def row_tokens(candidate: Candidate, sequences: Sequence[np.ndarray]) -> int:
    """sft: the longest sequence; else the prompt with its longest answer."""
    lengths = [len(one) for one in sequences] or [0]
    return max(lengths) if candidate.row.messages else lengths[0] + max(lengths[1:], default=0)


def number(value: Any) -> float | None:
    """A finite number that is given as one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def _alternates(roles: list[str]) -> bool:
    """User and assistant in turns, the user first. Results of tools answer an assistant, who then goes on."""
    expected = "user"
    for role in roles:
        if role == "tool":
            expected = "assistant"
        elif role != "system":
            if role != expected:
                return False
            expected = "assistant" if role == "user" else "user"
    return True
