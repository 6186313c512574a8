"""Rewards of GRPO: text in, numbers out. What each is for and needs: docs/rewards.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.worker.trl.config import RewardSettings, TrlSettings
from nemotron_recipes.worker.trl.panel import judged, read_panel
from nemotron_recipes.worker.trl.patience import TooLong, limited

AT_ONCE = 4  # programs of completions

_MARK = "####"  # GSM8K's way to mark the final answer
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_FILLER = re.compile(r"[\s$%€£]")


def final_answer(text: str) -> str | None:
    r"""What a completion gives as its answer: `\boxed{x}`, else `#### x`, else the last number, else the whole text.

    Reasoning up to `</think>` is left out: an answer that was only thought of is none.
    """
    text = text.rpartition("</think>")[2]
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    marked = _marked(text)
    if marked is not None:
        return marked
    numbers = _NUMBER.findall(text)
    if numbers:
        return str(numbers[-1])
    return text.strip() or None


def normalised(answer: str) -> str:
    """`1,200.50`, `$1200.5` and `1200.500` are one answer; other text is compared without case and outer spaces."""
    bare = _FILLER.sub("", answer).rstrip(".")
    if not _NUMBER.fullmatch(bare):
        return " ".join(answer.split()).rstrip(".").casefold()
    digits = format(Decimal(bare.replace(",", "")), "f")  # exact, and of any length: int() ends at 4300 digits
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits == "-0" else digits


def matches(completion: str, expected: str) -> bool:
    """Whether the completion's final answer equals the expected one."""
    found = final_answer(completion)
    return found is not None and normalised(found) == normalised(expected)


def exact_match(completions: list[Any], expected_answer: list[str], **columns: Any) -> list[float]:
    """1.0 where the final answer is right, else 0.0; the interface of a TRL reward function."""
    pairs = zip(completions, expected_answer, strict=True)
    return [float(matches(_text(completion), expected)) for completion, expected in pairs]


def matches_format(completions: list[Any], *, settings: RewardSettings, **columns: Any) -> list[float]:
    """1.0 where the whole completion matches `format_pattern` (a dot matches line ends, too), else 0.0."""
    pattern = re.compile(settings.format_pattern or "", re.DOTALL)
    return [_in_time(lambda text: pattern.fullmatch(text) is not None, _text(completion)) for completion in completions]


def passes_tests(completions: list[Any], extra: list[str], *, settings: RewardSettings, **columns: Any) -> list[float]:
    """Share of the row's `tests` that the last code block of the answer passes (sandbox.py)."""
    from nemotron_recipes.worker.trl.sandbox import share_passed

    limits = settings.code_seconds, settings.code_memory_mib << 20
    with ThreadPoolExecutor(AT_ONCE) as pool:
        codes = [_block(_text(completion), "python") for completion in completions]
        tests = [json.loads(row)["tests"] for row in extra]
        return list(pool.map(lambda code, of: share_passed(code, of, *limits), codes, tests))


def fits_schema(completions: list[Any], extra: list[str], **columns: Any) -> list[float]:
    """1.0 where the answer is JSON that the row's `schema` accepts, else 0.0."""
    schemas = [_validator(json.loads(row)["schema"]) for row in extra]
    pairs = zip(schemas, completions, strict=True)
    return [_in_time(partial(_accepts, schema), _text(completion)) for schema, completion in pairs]


def _in_time(judge: Callable[[str], bool], text: str) -> float:
    """1.0 where it says yes; a completion on which it does not come to an end has not earned it."""
    try:
        with limited():
            return float(judge(text))
    except TooLong as error:
        print(f"warning: {error}, and counts as 0: a pattern in format_pattern or in a schema backtracks", flush=True)
        return 0.0


REWARDS: dict[str, Callable[..., list[Any]]] = {
    "exact_match": exact_match,
    "format": matches_format,
    "code_tests": passes_tests,
    "json_schema": fits_schema,
    "judges": judged,
}
NEEDS = {"code_tests": "tests", "json_schema": "schema"}  # reward -> field of the row


def rewards_named(settings: TrlSettings, judges: Path | None = None) -> list[Callable[..., list[Any]]]:
    """The functions, with what they need to know. UserError: a name is unknown, or the judges' file can't be used."""
    names = settings.rewards
    unknown = [Problem(f"unknown reward '{name}'", fix=nearest(name, REWARDS)) for name in names if name not in REWARDS]
    if unknown:
        raise UserError(*unknown)
    panel = read_panel(judges) if judges is not None and "judges" in names else None
    return [_named(name, partial(REWARDS[name], settings=settings.reward_settings, panel=panel)) for name in names]


def check_rows(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """UserError: rows lack what a reward compares with, or it can't be used; found before training, not during."""
    problems = []
    for name in names:
        if (key := NEEDS.get(name)) is None:
            continue
        found = ((number, _unfit(key, row["extra"].get(key))) for number, row in enumerate(rows))
        wrong = [(number, why) for number, why in found if why]
        if wrong:
            number, why = wrong[0]
            what = f"the reward '{name}' can't use {len(wrong)} of {len(rows)} rows: in row {number + 1} {why}"
            problems.append(Problem(what, "data.path", f"prepare data whose rows have '{key}' (docs/rewards.md)"))
    if problems:
        raise UserError(*problems)


def _unfit(key: str, value: Any) -> str:
    if value is None:
        return f"there is no '{key}'"
    if key == "tests":
        pairs = isinstance(value, list) and value and all(_is_pair(test) for test in value)
        return "" if isinstance(value, str) or pairs else "'tests' is no Python and no list of {input, output}"
    try:
        _validator(value)
    except ValueError as error:
        return f"'schema' is no JSON schema: {error}"
    return ""


def _is_pair(test: Any) -> bool:
    return isinstance(test, dict) and all(isinstance(test.get(key), str) for key in ("input", "output"))


def _validator(schema: Any) -> Any:
    """ValueError: it is no schema. A reference to another place is not followed."""
    from jsonschema import validators
    from jsonschema.exceptions import SchemaError
    from referencing import Registry

    schema = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(schema, dict | bool):
        raise ValueError(f"it is neither an object nor true or false, but {json.dumps(schema)[:80]}")
    if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
        raise ValueError("its $schema is no text")
    kind = validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(error.message) from None
    return kind(schema, registry=Registry())


def _accepts(validator: Any, completion: str) -> bool:
    from referencing.exceptions import Unresolvable

    try:
        return bool(validator.is_valid(json.loads(_block(completion, "json"))))
    except (ValueError, RecursionError):
        return False
    except Unresolvable as error:
        raise UserError(Problem(f"a schema in the data refers to something outside of it: {error}")) from None


def _block(completion: str, language: str) -> str:
    """The last fenced block of that language or of none, else the whole answer; thoughts are left out."""
    answer = completion.rpartition("</think>")[2]
    blocks = re.findall(rf"```(?:{language})?[ \t]*\n(.*?)```", answer, re.DOTALL | re.IGNORECASE)
    return str(blocks[-1]) if blocks else answer.strip()


def _named(name: str, function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    function.__name__ = name  # TRL names the metric by it
    return function


def _text(completion: Any) -> str:
    """TRL hands over text, or messages where the prompt was messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def _marked(text: str) -> str | None:
    """The rest of the line after the last mark that has one. No pattern: on many blanks one takes cubic time."""
    after = (part.strip() for part in reversed(text.split(_MARK)[1:]))
    return next((part.split("\n")[0].rstrip() for part in after if part), None)


def _boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, with its braces balanced."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    begin = start + len(r"\boxed{")
    for position in range(begin, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            if depth == 0:
                return text[begin:position].strip()
            depth -= 1
    return None
