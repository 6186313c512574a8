"""Gates that somebody else wrote: found, made, and held to what a gate may give."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_recipes.data.gate_settings import OwnGate
from nemotron_recipes.data.gates import Candidate, Change, Corpus, Drop, Note, Quote, Swept, Verdict
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.spec import to_json

GROUP = "nemotron_recipes.gates"  # entry points of installed packages
MOST_REASONS = 50  # of one corpus gate: a byte per row says which


class _Checked:
    """A gate whose mistakes are named. UserError of each member: it raised, or gave what it may not."""

    def __init__(self, gate: Any):
        self._gate = gate
        self.name = str(gate.name)

    @property
    def key(self) -> Any:
        key = self._call(lambda: self._gate.key)
        self._call(to_json, key)
        return key

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        return _called(f"the gate '{self.name}' failed", method, *arguments)

    def _wrong(self, what: str, fix: str) -> UserError:
        return UserError(Problem(f"the gate '{self.name}': {what}", fix=fix))


class CheckedGate(_Checked):
    """A `RowGate`."""

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
        if verdict is None or (isinstance(verdict, kinds) and _telling(verdict)):
            return verdict
        allowed = ", ".join(kind.__name__ for kind in kinds)
        what = f"{method} gives a {type(verdict).__name__} that is no verdict: {verdict!r:.80}"
        raise self._wrong(what, f"None, or {allowed} of nemotron_recipes.data.gates with a reason")


class CheckedCorpusGate(_Checked):
    """A `CorpusGate`."""

    @property
    def width(self) -> int:
        width = self._call(lambda: self._gate.width)
        if type(width) is not int or width < 1:
            raise self._wrong(f"its width is {width!r:.80}", "the bytes of a signature, at least 1")
        return width

    def signature(self, candidate: Candidate, sequences: Sequence[np.ndarray]) -> bytes:
        signature = self._call(self._gate.signature, candidate, sequences)
        if not isinstance(signature, bytes) or len(signature) != self.width:
            size = f" of {len(signature)}" if isinstance(signature, bytes) else ""
            raise self._wrong(f"signature gives {type(signature).__name__}{size}", f"bytes of its width, {self.width}")
        return signature

    def sweep(self, corpus: Corpus, scratch: Path) -> Iterator[Swept]:
        found = self._call(lambda: iter(self._gate.sweep(corpus, scratch) or ()))
        last, reasons = -1, set()
        while (one := self._call(next, found, None)) is not None:
            if not isinstance(one, Swept) or not _telling(one):
                raise self._wrong(f"sweep gives {one!r:.80}", "Swept of nemotron_recipes.data.gates with a reason")
            if not isinstance(one.index, (int, np.integer)) or not last < one.index < corpus.rows:
                what = f"sweep gives row {one.index!r:.80} after row {last}, of {corpus.rows}"
                raise self._wrong(what, "each row once, by ascending index, from 0")
            reasons.add(one.reason)
            if len(reasons) > MOST_REASONS:
                raise self._wrong(f"more than {MOST_REASONS} reasons", "a reason is one of a closed set")
            last = one.index
            yield one


def _telling(verdict: Any) -> bool:
    return isinstance(verdict.reason, str) and bool(verdict.reason) and isinstance(verdict.example, (str, Quote))


def _called(what: str, method: Callable[..., Any], *arguments: Any) -> Any:
    """What somebody else's code gives. UserError: it raised."""
    try:
        return method(*arguments)
    except UserError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}, in {last.name}"
        raise UserError(Problem(f"{what}: {type(error).__name__}: {error}", where)) from error


def load_own(own: OwnGate, where: str) -> Any:
    """A gate that somebody else wrote. UserError: it can't be found or made, or lacks what a gate has."""
    found = _find(own.gate, where)
    gate = _called(f"{where}: {own.gate} can't be made (check {where}.options)", lambda: found(**(own.options or {})))
    wanted = {"RowGate": ("open", "check", "check_tokens"), "CorpusGate": ("width", "signature", "sweep")}
    kind = "CorpusGate" if hasattr(gate, "sweep") else "RowGate"
    missing = [name for name in ("name", "key", *wanted[kind]) if not hasattr(gate, name)]
    if missing:
        what = f"{where}: {own.gate} is no {kind}: it has no {', '.join(missing)}"
        raise UserError(Problem(what, fix="nemotron_recipes/data/gates/__init__.py says what a gate has"))
    return CheckedCorpusGate(gate) if kind == "CorpusGate" else CheckedGate(gate)


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
    except Exception as error:  # whatever a module raises as it is imported
        said = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
        fix = "the package must be importable where data prep runs: install it, or set PYTHONPATH"
        raise UserError(Problem(f"{where}: {reference} can't be loaded: {said}", fix=fix)) from error
    fix = nearest(reference, points) or f"install a package with an entry point in '{GROUP}', or give MODULE:ATTRIBUTE"
    raise UserError(Problem(f"{where}: no installed package has the gate '{reference}'", fix=fix))
