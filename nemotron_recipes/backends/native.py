"""What backends share whose own config has sections: dotted keys, translation, and what a schema says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from nemotron_recipes import image_list
from nemotron_recipes.backends import schemas
from nemotron_recipes.backends.layout import Layout
from nemotron_recipes.backends.schemas import NativeSchema
from nemotron_recipes.errors import Problem, nearest
from nemotron_recipes.spec import Tree

# Envelope keys that these backends have nothing for; each adds its own.
UNREAD = {"evaluation.max_new_tokens": "leave it out: no answers are generated before and after training"}
_ALONE = Layout(1).settings


@cache
def keys(names: tuple[str, ...]) -> frozenset[str]:
    """Every dotted key of the schemas of these names."""
    return frozenset(key for name in names for key in schemas.load(name).fields)


def schema_for(config: Tree, names: tuple[str, ...]) -> tuple[NativeSchema, str]:
    """The schema of the image that will be used, and a note where it is not known to be that of the version in it.

    names: what there is, oldest first; the newest is taken where nothing at all is known.
    """
    image = config["run"].get("container_image") or config["backend"]["image"]
    package = schemas.load(names[-1]).content["package"]
    stated, taken_for = image_list.versions_in(image or "")
    version = stated.get(package) or taken_for.get(package)
    schema = min((schemas.load(name) for name in names), key=lambda s: _distance(s.version, version))
    against = f"{package} {schema.version}"
    if image is None:
        return schema, f"no image is named: values are checked against {against}"
    if package not in stated:
        said = f"which version {image} holds is unknown"
        return schema, f"{said}: values are checked against {against}, the nearest known"
    if schema.version == version:
        return schema, ""
    return schema, f"{image} holds {package} {version}: values are checked against {schema.version}, the nearest known"


def checked_against(schema: NativeSchema) -> dict[str, str]:
    """For `Launch.versions`."""
    return {schema.content["package"]: schema.version}


def unknown_keys(schema: NativeSchema, given: Tree, elsewhere: frozenset[str]) -> Iterator[Problem]:
    """Keys that other versions have (`elsewhere`), and this one has not."""
    for key in flat(given, elsewhere):
        if key in elsewhere and key not in schema.fields:
            what = f"{schema.content['package']} {schema.version} has no '{key}'"
            yield Problem(what, f"backend.native.{key}", nearest(key, schema.fields))


def _distance(version: str, wanted: str | None) -> tuple[int, ...]:
    """How far apart two versions are, the first number first; none wanted: the newest is next."""
    numbers = _numbers(version)
    if wanted is None:
        return tuple(-number for number in numbers)
    return tuple(abs(a - b) for a, b in zip(numbers, _numbers(wanted), strict=True))


def _numbers(version: str) -> tuple[int, int, int]:
    found = [int(part) for part in re.findall(r"\d+", version)[:3]]
    first, second, third = (*found, 0, 0, 0)[:3]
    return first, second, third


def translate(config: Tree, table: Mapping[str, str], converted: Mapping[str, Any]) -> Tree:
    """Dotted native key -> value of each row; `converted` comes before the config.

    A section that is null is left out, but for `parallel`: a layout is stated, never the one of some example.
    """
    values: Tree = {}
    for key, native in table.items():
        section, _, name = key.partition(".")
        told = _ALONE if section == "parallel" and config[section] is None else config[section]
        if told is not None:
            values[native] = converted[key] if key in converted else told[name]
    return values


def nested(values: Mapping[str, Any]) -> Tree:
    """`{"a.b": 1}` -> `{"a": {"b": 1}}`; a number after a dot is a place in a list, given from 0 on."""
    tree: Tree = {}
    for key, value in values.items():
        *path, last = key.split(".")
        node: Any = tree
        for part, following in zip(path, [*path, last][1:], strict=True):
            node = node.setdefault(part, [] if following.isdigit() else {})
        if isinstance(node, list):
            node.append(value)
        else:
            node[last] = value
    return tree


def flat(tree: Tree, known: frozenset[str], prefix: str = "") -> Tree:
    """Dotted key -> value, down to keys that are `known` or to values."""
    found: Tree = {}
    for key, value in tree.items():
        name = prefix + key
        below = any(other.startswith(f"{name}.") for other in known)
        if isinstance(value, dict) and value and (below or name not in known):
            found |= flat(value, known, f"{name}.")
        else:
            found[name] = value
    return found


def owned_problems(config: Tree, owned: Mapping[str, str], prefixes: Mapping[str, str]) -> Iterator[Problem]:
    """Native keys that the launch decides itself."""
    for key in _names(config["backend"]["native"]):
        reason = owned.get(key) or next((why for prefix, why in prefixes.items() if key.startswith(prefix)), None)
        if reason:
            yield Problem(f"backend.native.{key} can't be set: {reason}", fix="leave it out")


def not_measured(config: Tree, name: str) -> Iterator[Problem]:
    """Envelope settings that these backends have nothing for."""
    if config["evaluation"]["rows"]:
        yield Problem(f"{name} measures no held-out rows before and after training", fix="evaluation.rows=0")
    if config["model"]["load_in_4bit"]:
        yield Problem(
            f"{name} does not train on a base in 4 bits", "model.load_in_4bit", "backend=unsloth or backend=trl"
        )
    if config["model"]["arch"]:
        yield Problem(f"{name} makes no tiny model", "model.arch", "~model.arch, or backend=trl")


def _names(tree: Tree, prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
