"""The trl worker's own keys of the worker file, read strictly: a hand-written train.yaml deserves a clear message.

Standard library only. The fields of `trainer` are checked against TRL's own class once that is imported (trainers.py).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.spec import Tree

METHODS = ("sft", "dpo", "kto", "grpo")
CONTAINER = "containers/unsloth.Dockerfile"  # the image that has Unsloth and bitsandbytes


@dataclass(frozen=True)
class ModelSettings:
    """How the base model is loaded; `arch` shapes the tiny model alone."""

    dtype: str = "bfloat16"
    attn_implementation: str = "sdpa"
    load_in_4bit: bool = False
    arch: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class LoraSettings:
    """LoRA adapters (arXiv 2106.09685)."""

    dim: int
    alpha: int
    target_modules: list[str]
    dropout: float = 0.0
    target_parameters: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RewardSettings:
    """What rewards need to know beside the row (config/schema.py says what each is)."""

    format_pattern: str | None = None
    code_seconds: float = 10.0
    code_memory_mib: int = 1024
    judges: str | None = None


@dataclass(frozen=True)
class UnslothSettings:
    """Train under Unsloth. Not required: with TRL alone where it can't be used."""

    required: bool = True


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out measurement; rows 0: none."""

    rows: int = 0
    max_new_tokens: int = 256


@dataclass(frozen=True)
class TrlSettings:
    """`trainer`: keyword arguments of TRL's config class for `method`, as they are meant for `processes` processes."""

    method: str
    trainer: Tree
    processes: int = 1
    pack_size: int | None = None  # what the recipe expects of the data; null: whatever data prep has made
    model: ModelSettings = ModelSettings()
    peft: LoraSettings | None = None
    unsloth: UnslothSettings | None = None
    rewards: list[str] = field(default_factory=list)
    reward_settings: RewardSettings = RewardSettings()
    resume_from: str | None = None
    evaluation: EvaluationSettings = EvaluationSettings()


def read_config(tree: Tree) -> TrlSettings:
    """UserError with every unknown key, missing key and wrong type."""
    problems: list[Problem] = []
    settings = _section(TrlSettings, tree, "", problems)
    method = tree.get("method")
    if isinstance(method, str) and method not in METHODS:
        problems.append(Problem(f"method: '{method}' is unknown", "worker file", nearest(method, METHODS)))
    if method == "grpo" and not tree.get("rewards"):
        problems.append(Problem("rewards: grpo needs at least one", "worker file"))
    if problems:
        raise UserError(*problems)
    return settings


def _section(kind: Any, tree: Any, prefix: str, problems: list[Problem]) -> Any:
    """An instance of dataclass `kind`, or None when something was wrong."""
    if not isinstance(tree, dict):
        problems.append(Problem(f"{prefix.rstrip('.')}: a section is expected, not {tree!r}", "worker file"))
        return None
    known = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    before = len(problems)
    for key in tree:
        if key not in known:
            problems.append(Problem(f"unknown key '{prefix}{key}'", "worker file", nearest(str(key), known)))
    values = {}
    for name, spec in known.items():
        if name in tree:
            values[name] = _value(hints[name], tree[name], prefix + name, problems)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            problems.append(Problem(f"{prefix}{name} is missing", "worker file"))
    return kind(**values) if len(problems) == before else None


def _value(hint: Any, value: Any, name: str, problems: list[Problem]) -> Any:
    """`value` as annotated; an int may stand for a float, nothing else is converted."""
    options = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    if is_dataclass(wanted):
        return _section(wanted, value, f"{name}.", problems)
    if get_origin(wanted) is list:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
    elif get_origin(wanted) is dict:
        if isinstance(value, dict):
            return value
    elif type(value) is wanted or (wanted is float and type(value) is int):
        return value
    shown = getattr(wanted, "__name__", str(wanted)) if get_origin(wanted) is None else str(wanted)
    problems.append(Problem(f"{name}: {value!r} is not of type {shown}", "worker file"))
    return None
