"""Sections that name a `_target_`: their keys are keyword arguments of that class or function, read from its source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemotron_recipes.backends.schemas import NativeSchema, fits, slip, told
from nemotron_recipes.errors import Problem, nearest
from nemotron_recipes.spec import Tree

TARGET = "_target_"


def problems(
    schema: NativeSchema, given: Tree, whole: Tree, prefix: str = "backend.native.", implied: Tree | None = None
) -> Iterator[Problem]:
    """What is wrong with the names and the types of what is `given`.

    whole     the same with all that the launch adds: a target may be its choice
    implied   dotted section -> the target that it has where none is named
    """
    for path, section, target in _sections(given, whole, implied or {}):
        if _is_closed(schema, path):
            continue  # its fields are the schema's own
        entry = _entry(schema, target)
        if TARGET in section and entry is None and (known := _should_know(schema, target)):
            yield Problem(f"{schema.name} has no '{target}'", f"{prefix}{path}{TARGET}", nearest(target, known))
        for key, value in section.items():
            name = f"{prefix}{path}{key}"
            if key.endswith("_fn") and isinstance(value, str) and _entry(schema, value) is None:
                if known := _should_know(schema, value):
                    yield Problem(f"{schema.name} has no '{value}'", name, nearest(value, known))
            elif entry is not None and key != TARGET:
                yield from _argument(entry, key, value, name, target)


def unchecked(schema: NativeSchema, given: Tree, whole: Tree, prefix: str = "backend.native.") -> Iterator[str]:
    """For people: keys that a target takes whatever they are called."""
    for path, section, target in _sections(given, whole, {}):
        entry = _entry(schema, target)
        known = {TARGET, *(entry["fields"] if entry else ()), *(entry.get("examples", ()) if entry else ())}
        names = [key for key in section if key not in known]
        if names and (entry is None or entry.get("open")):
            yield f"{prefix}{path}{{{', '.join(names)}}} goes to {target} as it is: nobody can check the names"


def _argument(entry: Tree, key: str, value: Any, name: str, target: str) -> Iterator[Problem]:
    fields, short = entry["fields"], target.rpartition(".")[2]
    if key in fields:
        if not (isinstance(value, dict) and TARGET in value) and not fits(value, fields[key]):
            yield Problem(f"'{name}' should be {told([fields[key]])}, not {value!r} ({short})")
    elif not entry.get("open"):
        yield Problem(f"{short} has no '{key}'", name, nearest(key, fields))
    elif close := slip(key, [*fields, *entry.get("examples", ())]):
        yield Problem(f"{short} has no '{key}'", name, f"did you mean '{close}'?")


def _sections(given: Tree, whole: Tree, implied: Tree, path: str = "") -> Iterator[tuple[str, Tree, str]]:
    """(dotted path with its last dot, what is given there, the target) of every section that has one."""
    for key, value in given.items():
        if isinstance(value, dict):
            all_of_it = whole.get(key, value)
            target = all_of_it.get(TARGET, implied.get(f"{path}{key}")) if isinstance(all_of_it, dict) else None
            if isinstance(target, str):
                yield f"{path}{key}.", value, target
            yield from _sections(value, all_of_it if isinstance(all_of_it, dict) else {}, implied, f"{path}{key}.")


def _is_closed(schema: NativeSchema, path: str) -> bool:
    own = schema.content["classes"].get(path.removesuffix("."))
    return own is not None and not own.get("open")


def _entry(schema: NativeSchema, target: str) -> Tree | None:
    entry: Tree | None = schema.content["classes"].get(schema.content["names"].get(target, target))
    return entry


def _should_know(schema: NativeSchema, target: str) -> list[str]:
    """The names that it could have been, where it would be known if it existed; else nothing."""
    content = schema.content
    package = target.partition(".")[0]
    if package != content["packages"][0].partition(".")[0]:
        return []  # another package's, or the user's own
    owner = target.rpartition(".")[0].removesuffix(".from_pretrained")
    there = any(owner == name or owner.startswith(f"{name}.") for name in content["packages"] if name != package)
    read = any(target.startswith(f"{name}.") for name in content["read"])
    known = [name for name in (*content["names"], *content["classes"]) if name.startswith(f"{package}.")]
    return known if read or not there else []
