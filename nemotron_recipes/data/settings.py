"""What data prep is told, checked again by the worker: a hand-written prep.yaml deserves a clear message too.

Standard library only, because the planner's side asks for `cross_problems` as well. Field names and defaults equal
`config/schema.py` (a test compares them); pydantic isn't needed where the worker runs.
"""

from __future__ import annotations

import re
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.spec import Tree

METHODS = ("sft", "dpo", "kto", "rl")
SPLITS = ("train", "validation", "test")
USED_COLUMNS = {
    "sft": frozenset({"messages", "prompt", "response", "expected_answer"}),
    "dpo": frozenset({"prompt", "chosen", "rejected"}),
    "kto": frozenset({"prompt", "completion", "label"}),
    "rl": frozenset({"messages", "prompt", "response", "expected_answer"}),
}


@dataclass(frozen=True)
class Source:
    """One source of rows; `path` is what the config said, for people."""

    path: str
    name: str | None = None
    split: Literal["train", "validation", "test"] | None = None
    weight: float = 1.0
    subset: str | None = None
    hub_split: str = "train"
    rows: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Columns:
    """Field names in the rows; None: the usual names."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    expected_answer: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Splits:
    """Shares that the hash of a row is held against."""

    train: float = 0.98
    validation: float = 0.01
    test: float = 0.01


@dataclass(frozen=True)
class Settings:
    """The `data` section of prep.yaml."""

    sources: list[Source]
    tokenizer: str
    columns: Columns = Columns()
    splits: Splits = Splits()
    sample: int | None = None
    pack_size: int = 4096
    overlong: Literal["drop", "truncate"] = "drop"
    format: Literal["native", "megatron_npy"] = "native"
    on_bad_row: Literal["count", "fail"] = "count"
    chat_template: str = "nemotron3"
    thinking: bool = True
    answer_pattern: str | None = None


def read_settings(data: Any, method: Any) -> Settings:
    """Settings from plain YAML values. UserError with every problem: unknown key, wrong type, impossible value."""
    problems: list[Problem] = []
    if method not in METHODS:
        problems.append(Problem(f"method: {method!r} is not a method of data prep", fix=nearest(str(method), METHODS)))
    settings = _section(Settings, data, "data", problems)
    if not problems:
        problems += _range_problems(settings)
    if not problems:
        problems += cross_problems(data, method)
    if problems:
        raise UserError(*problems)
    return settings


def cross_problems(data: Tree, method: str) -> list[Problem]:
    """What single fields can't show, of a `data` section whose fields are valid. Defaults may be left out."""
    settings = _section(Settings, data, "data", [])
    problems = _split_problems(settings) + _pattern_problems(settings.answer_pattern, method)
    for index, source in enumerate(settings.sources):
        if source.path.startswith("sample:") and source.rows is None and settings.sample is None:
            fix = f"set data.sources.{index}.rows"
            problems.append(Problem(f"data.sources.{index}: how many rows of {source.path}?", fix=fix))
    named = {field.name for field in fields(Columns) if getattr(settings.columns, field.name) is not None}
    for name in sorted(named - USED_COLUMNS[method]):
        fix = f"{method} reads: {', '.join(sorted(USED_COLUMNS[method]))}"
        problems.append(Problem(f"data.columns.{name} has no meaning for {method}", fix=fix))
    if "messages" in named and named & {"prompt", "response"}:
        problems.append(Problem("data.columns: messages and prompt/response exclude each other"))
    if method != "sft":
        if settings.format != "native":
            problems.append(Problem(f"data.format: {settings.format} is for sft; {method} rows are written as JSONL"))
        if settings.overlong == "truncate":
            fix = "leave data.overlong=drop"
            problems.append(Problem(f"data.overlong: a cut {method} row would mean something else", fix=fix))
    return problems


def _split_problems(settings: Settings) -> list[Problem]:
    shares = settings.splits
    total = shares.train + shares.validation + shares.test
    if abs(total - 1.0) > 1e-9:
        return [Problem(f"data.splits: train + validation + test is {total:g}, not 1")]
    open_sources = any(source.split is None for source in settings.sources)
    if not any(source.split == "train" for source in settings.sources) and not (open_sources and shares.train > 0):
        return [Problem("data.sources: no source gives rows to the train split", fix="set split: train on one")]
    return []


def _pattern_problems(pattern: str | None, method: str) -> list[Problem]:
    if pattern is None:
        return []
    if method not in ("sft", "rl"):
        return [Problem(f"data.answer_pattern has no meaning for {method}")]
    try:
        groups = re.compile(pattern, re.MULTILINE).groups
    except re.error as error:
        return [Problem(f"data.answer_pattern is not a regular expression: {error}", pattern)]
    if groups != 1:
        return [Problem(f"data.answer_pattern has {groups} groups", pattern, "put just the answer in (...)")]
    return []


def _range_problems(settings: Settings) -> list[Problem]:
    shares = settings.splits
    checks: list[tuple[str, Any, bool, str]] = [
        ("data.sources", settings.sources, len(settings.sources) > 0, "at least one source"),
        ("data.pack_size", settings.pack_size, settings.pack_size >= 8, "8 or more"),
        ("data.sample", settings.sample, settings.sample is None or settings.sample > 0, "above 0"),
    ]
    for name in SPLITS:
        share = getattr(shares, name)
        checks.append((f"data.splits.{name}", share, 0 <= share <= 1, "between 0 and 1"))
    for index, source in enumerate(settings.sources):
        where = f"data.sources.{index}"
        checks.append((f"{where}.rows", source.rows, source.rows is None or source.rows > 0, "above 0"))
        checks.append((f"{where}.weight", source.weight, 0 < source.weight < float("inf"), "above 0"))
    return [Problem(f"{key}: {value!r} must be {rule}") for key, value, valid, rule in checks if not valid]


def _section(kind: Any, tree: Any, where: str, problems: list[Problem]) -> Any:
    """An instance of dataclass `kind`; what is wrong goes to `problems`."""
    if not isinstance(tree, dict):
        problems.append(Problem(f"{where}: a section is expected, not {tree!r}"))
        return None
    known = {field.name: field for field in fields(kind)}
    hints = get_type_hints(kind)
    for key in tree:
        if key not in known:
            problems.append(Problem(f"unknown key '{where}.{key}'", fix=nearest(str(key), known)))
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in tree:
            values[name] = _value(hints[name], tree[name], f"{where}.{name}", problems)
        elif field.default is MISSING:
            problems.append(Problem(f"{where}.{name} is missing"))
    return None if problems else kind(**values)


def _value(hint: Any, value: Any, where: str, problems: list[Problem]) -> Any:
    """`value` as the annotated type; an int is fine for a float, nothing else is converted."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
        origin = get_origin(hint)
    if origin is list:
        if not isinstance(value, list):
            problems.append(Problem(f"{where}: a list is expected, not {value!r}"))
            return []
        return [_value(get_args(hint)[0], item, f"{where}.{i}", problems) for i, item in enumerate(value)]
    if is_dataclass(hint):
        return _section(hint, value, where, problems)
    if origin is Literal:
        if value not in get_args(hint):
            problems.append(Problem(f"{where}: {value!r} is not valid", fix=nearest(str(value), get_args(hint))))
        return value
    valid = isinstance(value, hint) or (hint is float and isinstance(value, int))
    if not valid or (isinstance(value, bool) and hint is not bool):
        problems.append(Problem(f"{where}: {value!r} is not of type {hint.__name__}"))
    return value
