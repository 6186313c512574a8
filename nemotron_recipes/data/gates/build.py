"""Settings -> the gates themselves, in the order in which `GateSettings` declares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from nemotron_recipes.data.gate_settings import GateSettings, OwnGate
from nemotron_recipes.data.gates import Gates
from nemotron_recipes.data.gates.contamination import ContaminationGate
from nemotron_recipes.data.gates.duplicates import ExactGate, NearGate
from nemotron_recipes.data.gates.language import LanguageGate
from nemotron_recipes.data.gates.pii import PiiGate
from nemotron_recipes.data.gates.simple import (
    JudgeGate,
    LengthGate,
    ProvenanceGate,
    QualityGate,
    RepetitionGate,
    StructureGate,
)
from nemotron_recipes.errors import Problem, UserError, nearest

GROUP = "nemotron_recipes.gates"  # entry points of installed packages
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


def load_own(own: OwnGate, where: str) -> Any:
    """A gate that somebody else wrote. UserError: it can't be found or made, or lacks what a gate has."""
    found = _find(own.gate, where)
    try:
        gate = found(**(own.options or {}))
    except TypeError as error:
        raise UserError(Problem(f"{where}: {own.gate} can't be made: {error}", fix=f"check {where}.options")) from None
    wanted = {"RowGate": ("open", "check", "check_tokens"), "CorpusGate": ("width", "signature", "sweep")}
    kind = "CorpusGate" if hasattr(gate, "sweep") else "RowGate"
    missing = [name for name in ("name", "key", *wanted[kind]) if not hasattr(gate, name)]
    if missing:
        what = f"{where}: {own.gate} is no {kind}: it has no {', '.join(missing)}"
        raise UserError(Problem(what, fix="nemotron_recipes/data/gates/__init__.py says what a gate has"))
    return gate


def _find(reference: str, where: str) -> Any:
    module, _, attribute = reference.partition(":")
    try:
        if attribute:
            value: Any = import_module(module)
            for name in attribute.split("."):
                value = getattr(value, name)
            return value
        points = {point.name: point for point in entry_points(group=GROUP)}
        if reference in points:
            return points[reference].load()
    except (ImportError, AttributeError) as error:
        fix = "the package must be importable where data prep runs: install it, or set PYTHONPATH"
        raise UserError(Problem(f"{where}: {reference} can't be loaded: {error}", fix=fix)) from None
    fix = nearest(reference, points) or f"install a package with an entry point in '{GROUP}', or give MODULE:ATTRIBUTE"
    raise UserError(Problem(f"{where}: no installed package has the gate '{reference}'", fix=fix))
