"""Hold a composed tree against the schema, the executor's fields and the backend's; every problem at once."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from nemotron_recipes.backends import REGISTRY as BACKENDS
from nemotron_recipes.backends import get_backend
from nemotron_recipes.config.compose import Composed
from nemotron_recipes.config.schema import KINDS
from nemotron_recipes.config.tree import flatten
from nemotron_recipes.errors import Problem, nearest
from nemotron_recipes.executors import REGISTRY as EXECUTORS
from nemotron_recipes.executors import get_executor
from nemotron_recipes.spec import Tree

DEFAULT_EXECUTOR = "local"
PACKAGE_HINT = "the first line of a recipe's config must be '# @package _global_'"


def validate(composed: Composed, config_path: str, kinds: Iterable[str] = tuple(KINDS)) -> tuple[Tree, list[Problem]]:
    """The complete config (defaults filled in) and no problems, or an empty tree and all problems.

    `run` is checked against the fields of the executor that it names, `backend.native` against the backend's.
    """
    tree = composed.tree
    kind = str(tree.get("kind"))
    if kind not in kinds:
        hint = PACKAGE_HINT if "recipe" in tree else f"set kind: {', '.join(kinds)}"
        if kind == "pipe":
            hint = "a pipe is no stage of a pipe, and its folder is named pipe: recipe/FAMILY/pipe/NAME.yaml"
        problem = Problem(f"config sets no valid kind ({kind})", config_path, hint)
        return {}, [*composed.problems, problem]
    model = KINDS[kind]
    problems: list[Problem] = list(composed.problems)
    checked: Tree = {}
    try:
        checked = model.model_validate(tree).model_dump()
        if kind == "train":
            problems += _method_problems(checked, origin_of(composed))
    except ValidationError as error:
        problems += _problems(error, model, origin_of(composed), "")
    run = tree.get("run", {})
    if isinstance(run, dict):
        problems += _executor_by_profile(composed)
        checked["run"], found = check_run(run, origin_of(composed))
        problems += found
    backend = tree.get("backend")
    if isinstance(backend, dict) and "backend" in model.model_fields:
        _check_backend(kind, backend, tree.get("method"), composed, problems)
    return ({}, problems) if problems else (checked, [])


def defaults_of(kind: str) -> Tree:
    """Flat dotted defaults of a kind's schema, required keys left out."""
    return flatten(_defaults(KINDS[kind]))


def check_run(run: Tree, origin: Callable[[str], str]) -> tuple[Tree, list[Problem]]:
    """`run`, or a profile, complete with its executor's defaults; or all that its executor does not have or take."""
    name = run.get("executor", DEFAULT_EXECUTOR)
    if name not in EXECUTORS:
        return {}, [Problem(f"unknown executor {name!r}", origin("run.executor"), nearest(str(name), EXECUTORS))]
    model = get_executor(name).profile_model
    try:
        return model.model_validate({**run, "executor": name}).model_dump(), []
    except ValidationError as error:
        return {}, _problems(error, model, origin, "run.")


def origin_of(composed: Composed) -> Callable[[str], str]:
    """Dotted key -> the layer that set it, in words."""
    return lambda key: str(composed.origin(key) or "")


def _method_problems(checked: Tree, origin: Callable[[str], str]) -> Iterator[Problem]:
    """The sections that belong to one method: that of this one must be there, and no other."""
    method = checked["method"]
    for section in ("dpo", "kto", "grpo"):
        given = checked.get(section) is not None
        if section == method and not given:
            fix = f"'++{section}={{}}' for its defaults"
            yield Problem(f"method {method} needs its section '{section}'", origin("method"), fix)
        elif section != method and given:
            what = f"the section '{section}' means nothing for method {method}"
            yield Problem(what, origin(section), f"leave it out: ~{section}")


def _executor_by_profile(composed: Composed) -> list[Problem]:
    origin = composed.origin("run.executor")
    if origin is None or origin.kind == "profile":
        return []
    return [Problem("the executor is chosen by a profile", str(origin), "use --run or --batch PROFILE")]


def _check_backend(kind: str, backend: Tree, method: Any, composed: Composed, problems: list[Problem]) -> None:
    name = backend.get("name")
    if name is None:
        return  # the schema has said so
    if name not in BACKENDS:
        where = str(composed.origin("backend.name") or "")
        problems.append(Problem(f"unknown backend {name!r}", where, nearest(str(name), BACKENDS)))
        return
    described = get_backend(name)
    if kind not in described.kinds:
        where = str(composed.origin("backend.name") or "")
        fitting = [other for other in BACKENDS if kind in get_backend(other).kinds]
        problems.append(Problem(f"backend {name} has no stage of kind {kind}", where, f"one of {', '.join(fitting)}"))
        return
    if method not in described.methods:
        where = str(composed.origin("backend.name") or "")
        fix = f"it does: {', '.join(sorted(described.methods))}"
        problems.append(Problem(f"backend {name} has no method '{method}'", where, fix))
        return
    for key, fix in described.unread(method).items():
        if _is_set(composed.tree, key):
            where = str(composed.origin(key) or "")
            problems.append(Problem(f"backend {name} has nothing for '{key}'", where, fix))
    native = backend.get("native")
    if not isinstance(native, dict):
        return
    valid = described.native_keys(method)
    back = {native_key: key for key, native_key in described.table(method).items()}
    for key in _native_names(native, valid):
        where = str(composed.origin(f"backend.native.{key}") or "")
        if key in back:
            fix = f"set {back[key]} instead"
            problems.append(Problem(f"'backend.native.{key}' and '{back[key]}' are one thing", where, fix))
        elif key not in valid and not _is_open(key, valid):
            problems.append(Problem(f"unknown key 'backend.native.{key}' of {name}", where, _closest(key, valid)))


def _is_set(tree: Any, key: str) -> bool:
    """Whether a layer has given a dotted key a value; null is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree is not None


def _closest(key: str, valid: frozenset[str]) -> str:
    return nearest(f"backend.native.{key}", [f"backend.native.{name}" for name in valid])


def _is_open(key: str, valid: frozenset[str]) -> bool:
    """Whether a section above the key takes whatever it is given."""
    parts = key.split(".")
    return any(".".join([*parts[:end], "*"]) in valid for end in range(1, len(parts) + 1))


def _native_names(native: Tree, valid: frozenset[str], prefix: str = "") -> Iterator[str]:
    """Dotted names of what is set: down to a value, or to a key below which the backend knows of nothing."""
    for key, value in native.items():
        name = prefix + str(key)
        section = name not in valid or any(other.startswith(f"{name}.") for other in valid)
        if isinstance(value, dict) and value and section:
            yield from _native_names(value, valid, f"{name}.")
        elif value != {}:
            yield name


def _problems(
    error: ValidationError, model: type[BaseModel], origin: Callable[[str], str], prefix: str
) -> list[Problem]:
    found = []
    for item in error.errors(include_url=False):
        key = prefix + ".".join(str(part) for part in item["loc"])
        where = origin(key)
        if where.startswith("profile"):
            key = key.removeprefix("run.")  # as env.toml has it
        kind, value = item["type"], item.get("input")
        fix = ""
        if kind == "extra_forbidden":
            words = getattr(model, "NOT_HERE", {}).get(item["loc"][-1])  # known elsewhere, and left out on purpose
            suggested = _suggest(tuple(item["loc"]), model, key.removesuffix(".".join(str(p) for p in item["loc"])))
            what, fix = (f"'{key}' is not to be set here", words) if words else (f"unknown key '{key}'", suggested)
        elif kind == "missing":
            what = f"'{key}' has no default and must be set"
            fix = f"add '{key}=...'" if not _in_list(item["loc"]) else f"add '{item['loc'][-1]}: ...' to that element"
        elif kind in ("model_type", "dict_type", "model_attributes_type"):
            what, fix = f"'{key}' is a section, not {value!r}", _as_section(tuple(item["loc"]), model, value)
        else:
            message = item["msg"].removeprefix("Input ").removeprefix("Value error, ")
            what = f"'{key}' {message}, not {value!r}"
        found.append(Problem(what, where, fix))
    return found


def _suggest(loc: tuple[Any, ...], model: type[BaseModel], prefix: str) -> str:
    """The nearest key in the same section, else the same name in another section, else what the section has."""
    if loc == ("recipe",):
        return PACKAGE_HINT
    section = _section_at(loc[:-1], model)
    valid = list(section.model_fields) if section else []
    close = nearest(str(loc[-1]), valid)
    if close.startswith("did"):
        path = prefix + "".join(f"{p}." for p in loc[:-1])
        return close.replace("'", f"'{path}", 1)
    elsewhere = [name for name in _names(model) if name.split(".")[-1] == loc[-1]]
    if elsewhere:
        return f"did you mean '{prefix}{elsewhere[0]}'?"
    anywhere = nearest(str(loc[-1]), _names(model)) if len(loc) == 1 else ""
    return anywhere if anywhere.startswith("did") else close


def _as_section(loc: tuple[Any, ...], model: type[BaseModel], value: Any) -> str:
    section = _section_at(loc, model)
    needed = [name for name, field in section.model_fields.items() if field.is_required()] if section else []
    return f"write {{{needed[0]}: {value}}}" if _in_list(loc) and len(needed) == 1 else "set a key below it"


def _in_list(loc: Iterable[Any]) -> bool:
    return any(isinstance(part, int) for part in loc)


def _section_at(loc: tuple[Any, ...], model: type[BaseModel]) -> type[BaseModel] | None:
    """The model of the section at a path; numbers stand for elements of a list."""
    section: type[BaseModel] | None = model
    for part in loc:
        if section is None or isinstance(part, int):
            continue
        field = section.model_fields.get(str(part))
        section = _section(field.annotation) if field else None
    return section


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `list[Source]` or `Lora | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        found = _section(inner)
        if found:
            return found
    return None


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        names.append(prefix + name)
        if section:
            names += _names(section, f"{prefix}{name}.")
    return names


def _defaults(model: type[BaseModel]) -> Tree:
    tree: Tree = {}
    for name, field in model.model_fields.items():
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            tree[name] = default.model_dump() if isinstance(default, BaseModel) else default
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            tree[name] = _defaults(field.annotation)
    return tree
