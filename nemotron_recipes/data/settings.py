"""What data prep is told: the one declaration of the `data` section.

Standard library only, because a worker reads it where no pydantic is; `config/schema.py` derives the planner's model
from these dataclasses. A hand-written prep.yaml is checked here and deserves a clear message too.
"""

from __future__ import annotations

import re
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from nemotron_recipes.data.gate_settings import GateSettings, gate_problems
from nemotron_recipes.data.rules import Fraction, Positive, Rule
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.spec import Tree

METHODS = ("sft", "dpo", "kto", "rl", "pretrain")
SPLITS = ("train", "validation", "test")
SAMPLED = frozenset(METHODS) - {"pretrain"}  # methods for which a weight says how often a row is taken
USED_COLUMNS = {
    "sft": frozenset({"messages", "prompt", "response", "expected_answer"}),
    "dpo": frozenset({"prompt", "chosen", "rejected"}),
    "kto": frozenset({"prompt", "completion", "label"}),
    "rl": frozenset({"messages", "prompt", "response", "expected_answer"}),
    "pretrain": frozenset({"text"}),
}


@dataclass(frozen=True)
class Columns:
    """Names of the fields in the rows, where they are not the usual ones. null: the usual names are looked for."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    expected_answer: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None
    label: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Source:
    """One data source. `path`: a reference (docs/contracts.md); `split` pins all its rows to one split."""

    path: str
    name: str | None = None
    split: Literal["train", "validation", "test"] | None = None  # where its rows go; null: by hash
    weight: Annotated[float, Rule(gt=0)] = 1.0  # share in the blend, relative to its size; pretrain: whatever its size
    columns: Columns | None = None  # instead of data.columns, for this source
    subset: str | None = None  # hub data sets only: the configuration name
    hub_split: str = "train"  # hub data sets only: the split that is read; all: one after another
    origin: str | None = None  # for the data card: who made the rows, and how
    license: str | None = None  # for the data card
    rows: Positive | None = None  # sample: how many rows to generate; else: read at most this many
    seed: int = 0  # sample: only


@dataclass(frozen=True)
class Splits:
    """Shares of rows without a predefined split; a hash of the row's content decides, so that rows stay put."""

    train: Fraction = 0.98
    validation: Fraction = 0.01
    test: Fraction = 0.01


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How rows become training data: the `data` section of prep.yaml."""

    sources: Annotated[list[Source], Rule(min_length=1)]
    blend: str | None = None  # a blend file (blend.py) that names the sources instead
    columns: Columns = Columns()
    splits: Splits = Splits()
    sample: Positive | None = None  # at most this many rows of each source
    pack_size: Annotated[int, Rule(ge=8)] = 4096  # tokens
    overlong: Literal["drop", "truncate", "split"] = "drop"  # rows longer than pack_size; counted either way
    format: Literal["native", "parquet", "megatron_npy"] = "native"
    on_bad_row: Literal["count", "fail"] = "count"
    tokenizer: str  # a reference
    engine: Literal["tokenizers", "fastokens"] = "tokenizers"  # what encodes; both give the same ids
    workers: Positive | None = None  # processes; null: what is worth it, up to one per CPU. The result is the same
    chat_template: str | None = "nemotron3"  # nemotron3, or a path to a .jinja file; pretrain: null
    end_of_document: str | None = None  # pretrain: the token after each document
    thinking: bool = True  # the generation prompt opens a reasoning block
    answer_pattern: str | None = None  # regex with one group that finds the final answer in a reference answer
    gates: GateSettings | None = None  # curation; null: none


def read_settings(data: Any, method: Any) -> Settings:
    """Settings from plain YAML values. UserError with every problem: unknown key, wrong type, impossible value."""
    problems: list[Problem] = []
    if method not in METHODS:
        problems.append(Problem(f"method: {method!r} is not a method of data prep", fix=nearest(str(method), METHODS)))
    settings = _section(Settings, data, "data", problems)
    if not problems:
        problems += cross_problems(data, method)
    if problems:
        raise UserError(*problems)
    return settings


def read_section(kind: Any, tree: Any, where: str) -> Any:
    """An instance of a dataclass declared like `Settings`. UserError with every problem."""
    problems: list[Problem] = []
    found = _section(kind, tree, where, problems)
    if problems:
        raise UserError(*problems)
    return found


def cross_problems(data: Tree, method: str) -> list[Problem]:
    """What single fields can't show, of a `data` section whose fields are valid. Defaults may be left out."""
    settings = _section(Settings, data, "data", [])
    problems = _split_problems(settings) + _pattern_problems(settings.answer_pattern, method)
    problems += gate_problems(settings.gates, method)
    if settings.blend is not None:
        problems.append(Problem("data.blend is the plan's: a worker file holds the sources themselves"))
    for index, source in enumerate(settings.sources):
        if source.path.startswith("sample:") and source.rows is None and settings.sample is None:
            fix = f"set data.sources.{index}.rows"
            problems.append(Problem(f"data.sources.{index}: how many rows of {source.path}?", fix=fix))
    problems += _column_problems(settings.columns, "data.columns", method)
    for index, source in enumerate(settings.sources):
        if source.columns is not None:
            problems += _column_problems(source.columns, f"data.sources.{index}.columns", method)
    problems += _pretrain_problems(settings, method)
    if method != "sft":
        if settings.format != "native":
            problems.append(Problem(f"data.format: {settings.format} is for sft; {method} rows are written as JSONL"))
        if settings.overlong != "drop":
            fix = "leave data.overlong=drop"
            problems.append(Problem(f"data.overlong: a cut {method} row would mean something else", fix=fix))
    return problems


def _column_problems(columns: Columns, where: str, method: str) -> list[Problem]:
    named = {field.name for field in fields(Columns) if getattr(columns, field.name) is not None}
    fix = f"{method} reads: {', '.join(sorted(USED_COLUMNS[method]))}"
    problems = [Problem(f"{where}.{name} has no meaning for {method}", fix=fix)
                for name in sorted(named - USED_COLUMNS[method])]  # fmt: skip
    if "messages" in named and named & {"prompt", "response"}:
        problems.append(Problem(f"{where}: messages and prompt/response exclude each other"))
    return problems


def _pretrain_problems(settings: Settings, method: str) -> list[Problem]:
    """What only documents have, and what only conversations have."""
    problems = []
    pretrain = method == "pretrain"
    if pretrain and settings.end_of_document is None:
        fix = "set data.end_of_document to the token that ends a document for the base model, such as </s>"
        problems.append(Problem("data.end_of_document is missing", fix=fix))
    if not pretrain and settings.end_of_document is not None:
        problems.append(Problem(f"data.end_of_document has no meaning for {method}"))
    if pretrain and settings.chat_template is not None:
        problems.append(Problem("data.chat_template has no meaning for pretrain", fix="data.chat_template=null"))
    if not pretrain and settings.chat_template is None:
        problems.append(Problem("data.chat_template is missing", fix="nemotron3, or a path to a .jinja file"))
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


def _section(kind: Any, tree: Any, where: str, problems: list[Problem]) -> Any:
    """An instance of dataclass `kind`; what is wrong goes to `problems`."""
    if not isinstance(tree, dict):
        problems.append(Problem(f"{where}: a section is expected, not {tree!r}"))
        return None
    known = {field.name: field for field in fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
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
    if origin is Annotated:
        plain, *rules = get_args(hint)
        count = len(problems)
        checked = _value(plain, value, where, problems)
        broken = [rule.broken(checked) for rule in rules if isinstance(rule, Rule)] if len(problems) == count else []
        problems += [Problem(f"{where}: {value!r} must {words}") for words in broken if words]
        return checked
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        inner = next(option for option in get_args(hint) if option is not type(None))
        return _value(inner, value, where, problems)
    if origin is list:
        if not isinstance(value, list):
            problems.append(Problem(f"{where}: a list is expected, not {value!r}"))
            return []
        return [_value(get_args(hint)[0], item, f"{where}.{i}", problems) for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            problems.append(Problem(f"{where}: a section is expected, not {value!r}"))
        return value
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
