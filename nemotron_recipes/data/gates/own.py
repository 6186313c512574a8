"""Gates that somebody else wrote: found, made, and held to what a gate may give."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from nemotron_recipes.data.gate_settings import OwnGate
from nemotron_recipes.data.gates import Candidate, Change, Drop, Note, Verdict
from nemotron_recipes.errors import Problem, UserError, nearest

GROUP = "nemotron_recipes.gates"  # entry points of installed packages


class CheckedGate:
    """A `RowGate` whose mistakes are named. UserError of each method: it raised, or gave what is no verdict."""

    def __init__(self, gate: Any):
        self._gate = gate
        self.name = gate.name

    @property
    def key(self) -> Any:
        return self._gate.key

    def open(self) -> None:
        self._call(self._gate.open)

    def check(self, candidate: Candidate) -> Verdict:
        verdict: Verdict = self._verdict("check", (Drop, Change, Note), candidate)
        return verdict

    def check_tokens(self, candidate: Candidate, sequences: Sequence[np.ndarray]) -> Drop | Note | None:
        verdict: Drop | Note | None = self._verdict("check_tokens", (Drop, Note), candidate, sequences)
        return verdict

    def _verdict(self, method: str, kinds: tuple[type[Drop | Change | Note], ...], *arguments: Any) -> Any:
        verdict = self._call(getattr(self._gate, method), *arguments)
        if verdict is None or (isinstance(verdict, kinds) and isinstance(verdict.reason, str) and verdict.reason):
            return verdict
        allowed = ", ".join(kind.__name__ for kind in kinds)
        what = f"the gate '{self.name}': {method} gives a {type(verdict).__name__} that is no verdict: {verdict!r:.80}"
        raise UserError(Problem(what, fix=f"None, or {allowed} of nemotron_recipes.data.gates with a reason"))

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except UserError:
            raise
        except Exception as error:  # whatever somebody else's code raises
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"the gate '{self.name}' failed: {type(error).__name__}: {error}"
            raise UserError(Problem(what, f"{last.filename}, line {last.lineno}, in {last.name}")) from error


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
    return gate if kind == "CorpusGate" else CheckedGate(gate)


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
