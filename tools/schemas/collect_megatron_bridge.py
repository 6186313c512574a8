"""Runs inside the environment of one megatron-bridge version, on a CPU: its config classes as JSON on stdout.

    python collect_megatron_bridge.py STUB,STUB,... RECIPE,RECIPE,...

A recipe is MODULE:FUNCTION below megatron.bridge.recipes. Only stubs.py is imported of this project.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import sys
import types
import typing
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import stubs

# Sections whose declared type is a base class of what is used: which classes they may be.
ALTERNATIVES = {
    "peft": ("megatron.bridge.peft.lora:LoRA", "megatron.bridge.peft.dora:DoRA"),
    "comm_overlap": ("megatron.bridge.training.comm_overlap:CommOverlapConfig",),
    "mixed_precision": ("megatron.bridge.training.mixed_precision:MixedPrecisionConfig",),
}
SCALARS = {int: "int", float: "float", bool: "bool", str: "str", type(None): "None"}


class Collector:
    """Fills `classes` with every dataclass that a section may hold, however deep."""

    def __init__(self) -> None:
        self.classes: dict[str, Any] = {}

    def add(self, cls: type) -> str:
        name = cls.__name__
        if name in self.classes:
            return name
        found: dict[str, Any] = {}
        self.classes[name] = {"module": cls.__module__, "fields": found}
        hints = hints_of(cls)
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            entry: dict[str, Any] = self.type_of(hints.get(field.name, Any))
            default = field.default
            if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
                try:
                    default = field.default_factory()
                except Exception:  # noqa: BLE001  someone else's factory, which may want a GPU
                    default = None
                    entry["default_is"] = "made at run time"
            if default is dataclasses.MISSING:
                entry["required"] = True
            elif (plain := plain_value(default)) is not NotImplemented:
                entry["default"] = plain
            else:
                entry["default_is"] = type(default).__name__
            found[field.name] = entry
        return name

    def type_of(self, hint: Any) -> dict[str, Any]:
        """{"type": "int | None"}, with `choices` of a Literal, and `class` for a nested section."""
        members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        names: set[str] = set()
        choices: list[Any] = []
        nested: list[str] = []
        for member in members:
            if typing.get_origin(member) is typing.Literal:
                choices += typing.get_args(member)
                names |= {SCALARS.get(type(value), "any") for value in typing.get_args(member)}
            elif member in SCALARS:
                names.add(SCALARS[member])
            elif isinstance(member, type) and dataclasses.is_dataclass(member):
                nested.append(self.add(member))
                names.add("section")
            elif member is list or typing.get_origin(member) is list:
                names.add("list")
            elif isinstance(member, type) and issubclass(member, Path):
                names.add("str")
            else:
                names.add("any")
        entry: dict[str, Any] = {"type": "any" if "any" in names else " | ".join(sorted(names))}
        if choices:
            entry["choices"] = choices
        if nested:
            entry["class"] = sorted(nested)
        return entry


def hints_of(cls: type) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, annotation in vars(base).get("__annotations__", {}).items():
            if isinstance(annotation, str):
                try:
                    annotation = eval(annotation, vars(sys.modules[base.__module__]), dict(vars(typing)))
                except Exception:  # noqa: BLE001  a name that exists for type checkers only
                    annotation = Any
            hints[name] = annotation
    return hints


def plain_value(value: Any) -> Any:
    """As YAML would have it; NotImplemented for what has no such form."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, enum.Enum) else value
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value)
    if isinstance(value, (list, tuple)):
        items = [plain_value(item) for item in value]
        return NotImplemented if any(item is NotImplemented for item in items) else items
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        plain = {key: plain_value(item) for key, item in value.items()}
        return NotImplemented if any(item is NotImplemented for item in plain.values()) else plain
    return NotImplemented


def values_of(config: Any) -> dict[str, Any]:
    """section -> {field: value} of a recipe's sections, where a plain value differs from the class's default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if not dataclasses.is_dataclass(section):
            found[field.name] = plain_value(section) if plain_value(section) is not NotImplemented else None
            continue
        own = {}
        for item in dataclasses.fields(section):
            value = plain_value(getattr(section, item.name, None))
            default = plain_value(item.default) if item.default is not dataclasses.MISSING else NotImplemented
            if value is not NotImplemented and value != default and item.init:
                own[item.name] = value
        found[field.name] = {"class": type(section).__name__, "values": own}
    return found


def main() -> None:
    stub_names, recipes = sys.argv[1].split(","), sys.argv[2].split(",")
    answer = sys.stdout
    sys.stdout = sys.stderr  # some versions print while they are imported
    stubs.install(stub_names)
    config_module = importlib.import_module("megatron.bridge.training.config")
    collector = Collector()
    container = config_module.ConfigContainer
    sections: dict[str, Any] = {}
    plain: dict[str, Any] = {"recipe": {"type": "str"}}  # what stands above the sections, or in the place of one
    hints = hints_of(container)
    for field in dataclasses.fields(container):
        if field.name.startswith("_"):
            continue
        entry = collector.type_of(hints[field.name])
        names = set(entry.get("class", ()))
        if scalars := set(entry["type"].split(" | ")) - {"section", "None", "any"}:
            plain[field.name] = {"type": " | ".join(sorted({*scalars, "None"}))}
        for target in ALTERNATIVES.get(field.name, ()):
            module, _, attribute = target.partition(":")
            names.add(collector.add(getattr(importlib.import_module(module), attribute)))
        sections[field.name] = names
    made: dict[str, Any] = {}
    for recipe in recipes:
        module, _, function = recipe.partition(":")
        make = getattr(importlib.import_module(f"megatron.bridge.recipes.{module}"), function)
        made[function] = {
            "module": f"megatron.bridge.recipes.{module}",
            "parameters": sorted(inspect.signature(make).parameters),
        }
        try:
            config = make()
        except (OSError, ValueError) as error:  # it reads the model's config from the hub, and here is no network
            print(f"{function}: {str(error).splitlines()[0]}", file=sys.stderr)
            made[function]["values"] = "follow from the model's config on the hub"
            continue
        for field in dataclasses.fields(config):
            section = getattr(config, field.name)
            if dataclasses.is_dataclass(section) and not field.name.startswith("_"):
                sections[field.name].add(collector.add(type(section)))
        made[function]["sections"] = values_of(config)
    print(
        json.dumps(
            {
                "package": "megatron-bridge",
                "version": metadata.version("megatron-bridge"),
                "top": plain,
                "with": {n: metadata.version(n).partition("+")[0] for n in ("megatron-core", "torch", "transformers")},
                "stubs": stub_names,
                "sections": {name: sorted(names) for name, names in sections.items()},
                "classes": dict(sorted(collector.classes.items())),
                "recipes": made,
            },
            indent=1,
            sort_keys=True,
            default=str,
        ),
        file=answer,
    )


if __name__ == "__main__":
    main()
