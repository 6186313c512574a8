"""Settings -> the gates themselves, in the order in which `GateSettings` declares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from nemotron_recipes.data.gate_settings import GateSettings
from nemotron_recipes.data.gates import Gates
from nemotron_recipes.data.gates.contamination import ContaminationGate
from nemotron_recipes.data.gates.duplicates import ExactGate, NearGate
from nemotron_recipes.data.gates.language import LanguageGate
from nemotron_recipes.data.gates.own import load_own
from nemotron_recipes.data.gates.pii import PiiGate
from nemotron_recipes.data.gates.simple import (
    JudgeGate,
    LengthGate,
    ProvenanceGate,
    QualityGate,
    RepetitionGate,
    StructureGate,
)

_ROWS: dict[str, Callable[[Any], Any]] = {
    "provenance": ProvenanceGate,
    "structure": StructureGate,
    "quality": QualityGate,
    "judge": JudgeGate,
    "length": LengthGate,
    "repetition": RepetitionGate,
    "language": LanguageGate,
    "pii": PiiGate,
}
_CORPUS: dict[str, Callable[[Any], Any]] = {"exact_duplicates": ExactGate, "near_duplicates": NearGate}


def build_gates(settings: GateSettings | None, evaluations: tuple[Path, ...] = ()) -> Gates:
    """`evaluations`: where the files of `contamination` lie. UserError: an own gate can't be had."""
    rows: list[Any] = []
    corpus: list[Any] = []
    for field in fields(GateSettings):
        section = getattr(settings, field.name, None)
        if section is None:
            continue
        if field.name == "contamination":
            rows.append(ContaminationGate(section, evaluations))
        elif field.name == "own":
            for index, own in enumerate(section):
                gate = load_own(own, f"data.gates.own.{index}")
                (corpus if hasattr(gate, "sweep") else rows).append(gate)
        elif field.name in _ROWS:
            rows.append(_ROWS[field.name](section))
        else:
            corpus.append(_CORPUS[field.name](section))
    return Gates(tuple(rows), tuple(corpus))
