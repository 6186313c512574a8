"""What the real packages accept, version by version: files that tools/schemas/build.py writes from the packages.

Plain JSON and the standard library, so that a typo is found on a laptop that has none of those packages.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import Problem, nearest
from nemotron_recipes.spec import Tree

HERE = Path(__file__).parent
_NEAR = 0.85


@dataclass(frozen=True, eq=False)
class NativeSchema:
    """The sections of one version of one package."""

    name: str  # of the file: megatron_bridge-0.3.1
    content: Tree

    @property
    def version(self) -> str:
        return self.content["version"]

    @property
    def recipes(self) -> tuple[str, ...]:
        """Named recipes whose values are known."""
        return tuple(self.content["recipes"])

    @cached_property
    def fields(self) -> dict[str, list[Tree]]:
        """Dotted key -> what it may be; several where a section has several possible classes."""
        found: dict[str, list[Tree]] = {key: [entry] for key, entry in self.content["top"].items()}
        for section, names in self.content["sections"].items():
            for name in names:
                self._add(section, name, found, depth=0)
        return found

    def of_class(self, section: str, name: str) -> dict[str, list[Tree]]:
        """As `fields`, of a section that is of that one class."""
        found: dict[str, list[Tree]] = {}
        self._add(section, name, found, depth=0)
        return found

    def problems(self, native: Tree, prefix: str = "backend.native.") -> Iterator[Problem]:
        """Values of the wrong type, words that are no choice; where any name is taken, slips for a known one."""
        for key, value in _leaves(native, self.fields):
            entries = self.fields.get(key)
            if entries is None and (close := self._meant(key)):
                yield Problem(f"unknown key '{prefix}{key}' of {self.name}", fix=f"did you mean '{prefix}{close}'?")
            if entries and not any(fits(value, entry) for entry in entries):
                yield Problem(f"'{prefix}{key}' should be {told(entries)}, not {value!r} ({self.name})")

    def _meant(self, key: str) -> str:
        """The known name that a name in an open section is a slip for; "" for one that may be what it says."""
        parts = key.split(".")
        for end in range(1, len(parts)):
            section = ".".join(parts[:end])
            for entry in self.fields.get(f"{section}.*", ()):
                close = slip(parts[end], entry.get("examples", ()))
                if close:
                    return f"{section}.{close}"
        return ""

    def _add(self, prefix: str, name: str, found: dict[str, list[Tree]], depth: int) -> None:
        entry = self.content["classes"][name]
        if entry.get("open"):
            found.setdefault(f"{prefix}.*", []).append({"type": "any"})
        for field, told in entry["fields"].items():
            key = f"{prefix}.{field}"
            found.setdefault(key, []).append(told)
            for nested in told.get("class", ()):
                if depth < 3:  # classes may hold themselves
                    self._add(key, nested, found, depth + 1)


def slip(name: str, known: Iterable[str]) -> str:
    """The known name that `name` is so like that it is taken for a slip; "" where it is one of them, or like none."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=_NEAR)
    return close[0] if close and close[0] != name else ""


@cache
def load(name: str) -> NativeSchema:
    """The checked-in schema of that name."""
    return NativeSchema(name, json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")))


def _leaves(tree: Tree, fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = prefix + key
        if isinstance(value, dict) and any(field.startswith(f"{name}.") for field in fields):
            yield from _leaves(value, fields, f"{name}.")
        else:
            yield name, value


def fits(value: Any, entry: Tree) -> bool:
    """Whether a value is of a type, or one of the choices, that a field takes."""
    if "choices" in entry and (value in entry["choices"] or (value is None and "None" in entry["type"])):
        return True
    if entry["type"] == "any":
        return True
    names = set(entry["type"].split(" | "))
    if "choices" in entry:  # what else than the choices it may be
        names -= {"str"}
    actual = "None" if value is None else type(value).__name__
    actual = {"tuple": "list", "dict": "section"}.get(actual, actual)
    return actual in names or (actual == "int" and "float" in names)


def told(entries: list[Tree]) -> str:
    """The types and choices of a field, for people."""
    said = []
    for entry in entries:
        said.append(", ".join(repr(c) for c in entry["choices"]) if "choices" in entry else entry["type"])
    return " or ".join(dict.fromkeys(said))


def unknown_recipe(schema: NativeSchema, recipe: str, key: str = "backend.native.recipe") -> Problem:
    """A named recipe that this version does not have."""
    return Problem(f"{schema.name} has no recipe '{recipe}'", key, nearest(recipe, schema.recipes))
