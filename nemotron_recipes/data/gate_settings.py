"""What the gates are told: the one declaration of `data.gates`. A gate is on where its section is there.

Standard library only, as `settings.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple

from nemotron_recipes.data.rules import Fraction, Positive, Rule
from nemotron_recipes.errors import Problem, nearest

PII_KINDS = ("email", "phone", "card", "ip", "key")
_CONDITION = re.compile(r"\s*([\w.-]+)\s*(>=|<=|==|!=|>|<)\s*([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*")
_NAMES = Annotated[list[str], Rule(min_length=1)]

# What py3langid 0.4 tells apart; zxx is text in no language, such as program code.
_CODES = """
    ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv
    fy ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky
    la lb lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh
    se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu zxx
"""
LANGUAGES = frozenset(_CODES.split())


class Condition(NamedTuple):
    """`field op number`; a dot in `field` goes into an object."""

    field: str
    op: str
    number: float


@dataclass(frozen=True)
class Provenance:
    """Fields that every row must have. null: not asked for."""

    license_field: str | None = "license"
    source_field: str | None = "source"
    customer_data_field: str | None = "customer_data"  # true or false: does the row hold customers' data
    licenses: _NAMES | None = None  # those allowed; null: any that is named
    customer_data: Literal["drop", "keep"] = "drop"  # rows where that field is true


@dataclass(frozen=True)
class Structure:
    """Shape of a conversation. Turns are those of users and assistants; of preference and RL rows the prompt's."""

    min_turns: Positive | None = None
    max_turns: Positive | None = None
    alternating: bool = True  # user and assistant in turns, the user first; tool results don't count
    ends_with_assistant: bool = True  # sft only
    system: Literal["any", "required", "forbidden"] = "any"


@dataclass(frozen=True)
class Quality:
    """Conditions on number fields of the row, as `score >= 7`; all must hold."""

    where: _NAMES
    missing: Literal["drop", "keep"] = "drop"  # rows without such a field


@dataclass(frozen=True)
class Judge:
    """A field that says how consistent judges were; `nemotron data from-logs` writes `agreement`."""

    field: str = "agreement"
    min: float = 0.7


@dataclass(frozen=True)
class Length:
    """Tokens of the longest sequence that the row gives; characters of all its answers together."""

    min_tokens: Positive | None = None
    max_tokens: Positive | None = None
    min_answer_chars: Positive | None = None
    max_answer_chars: Positive | None = None


@dataclass(frozen=True)
class Repetition:
    """Word n-grams that occur before in the same answer, as a share of all its n-grams."""

    ngram: Positive = 10
    max_share: Fraction = 0.3


@dataclass(frozen=True)
class Language:
    """Languages to keep, as ISO 639 codes (zxx: program code and the like). py3langid guesses from the row's text."""

    allow: _NAMES
    min_probability: Fraction = 0.5  # rows below are counted as unclear and left out
    min_chars: Positive = 40  # shorter texts are not judged


@dataclass(frozen=True)
class Contamination:
    """Rows that share a word n-gram with an evaluation file."""

    files: _NAMES  # references: .jsonl files or folders with some
    fields: _NAMES | None = None  # of the evaluation's rows; null: every text in them
    ngram: Annotated[int, Rule(ge=8)] = 13  # as GPT-3 was checked (arXiv 2005.14165, appendix C)


@dataclass(frozen=True)
class Pii:
    """Personal data and credentials in any text of the row."""

    action: Literal["report", "redact", "drop"] = "report"
    kinds: Annotated[list[Literal["email", "phone", "card", "ip", "key"]], Rule(min_length=1)] | None = (
        None  # null: all
    )
    phone_region: str | None = None  # ISO 3166 code whose national numbers count, too; null: only +NN...


@dataclass(frozen=True)
class OwnGate:
    """`gate`: a name of the entry point group `nemotron_recipes.gates`, or MODULE:ATTRIBUTE; called with `options`."""

    gate: str
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class ExactDuplicates:
    """Equal rows, or rows with equal prompts; the first one stays, and held-out rows that training has go."""

    by: Literal["row", "prompt"] = "row"


@dataclass(frozen=True)
class NearDuplicates:
    """MinHash over n-grams. `threshold`: estimated Jaccard similarity from which rows are duplicates."""

    threshold: Annotated[float, Rule(ge=0.5, le=1)] = 0.8
    # token ids of all that is rendered, or words of all turns but the system's: rows that share a long system prompt
    # or list of tools look alike in tokens
    of: Literal["tokens", "words"] = "tokens"
    ngram: Positive = 5
    keep: Literal["first", "longest"] = "first"
    permutations: Annotated[int, Rule(ge=64, le=1024)] = 128  # more: a sharper estimate, more time and disk


@dataclass(frozen=True)
class GateSettings:
    """Gates in the order in which they judge. Duplicates are found among what the others leave."""

    provenance: Provenance | None = None
    structure: Structure | None = None
    quality: Quality | None = None
    judge: Judge | None = None
    length: Length | None = None
    repetition: Repetition | None = None
    language: Language | None = None
    contamination: Contamination | None = None
    pii: Pii | None = None
    own: list[OwnGate] | None = None
    exact_duplicates: ExactDuplicates | None = None
    near_duplicates: NearDuplicates | None = None


def read_condition(text: str) -> Condition | None:
    """None: the text is no condition."""
    match = _CONDITION.fullmatch(text)
    return None if match is None else Condition(match[1], match[2], float(match[3]))


def gate_problems(settings: GateSettings | None, method: str) -> list[Problem]:
    """What types alone can't show."""
    problems: list[Problem] = []
    if settings is None:
        return problems
    for text in settings.quality.where if settings.quality else ():
        if read_condition(text) is None:
            fix = "write FIELD OPERATOR NUMBER, for example 'score >= 7'"
            problems.append(Problem(f"data.gates.quality.where: '{text}' is not a condition", fix=fix))
    for name in ("structure", "length"):
        section = getattr(settings, name)
        for key in ("turns", "tokens", "answer_chars"):
            low, high = getattr(section, f"min_{key}", None), getattr(section, f"max_{key}", None)
            if low is not None and high is not None and low > high:
                problems.append(Problem(f"data.gates.{name}: min_{key} {low} is above max_{key} {high}"))
    if settings.length == Length():
        limits = ", ".join(field.name for field in fields(Length))
        problems.append(Problem("data.gates.length has no limit", fix=f"set one of {limits}"))
    if method == "pretrain" and settings.structure is not None:
        problems.append(Problem("data.gates.structure has no meaning for pretrain: documents have no turns"))
    if method == "rl" and settings.repetition is not None:
        problems.append(Problem("data.gates.repetition has no meaning for rl: its rows have no answers"))
    for index, file in enumerate(settings.contamination.files if settings.contamination else ()):
        if file.startswith(("hf://", "sample:")):
            fix = "download it, and give the file, a folder with .jsonl files, or artifact:NAME"
            problems.append(Problem(f"data.gates.contamination.files.{index}: {file} is not a file", fix=fix))
    region = settings.pii.phone_region if settings.pii else None
    if region is not None and not re.fullmatch("[A-Z]{2}", region):
        problems.append(Problem(f"data.gates.pii.phone_region: '{region}' is no ISO 3166 code such as DE or US"))
    for index, own in enumerate(settings.own or ()):
        if not re.fullmatch(r"[\w.-]+(:[\w.]+)?", own.gate):
            fix = "give the name of an entry point, or MODULE:ATTRIBUTE"
            problems.append(Problem(f"data.gates.own.{index}.gate: '{own.gate}' names no gate", fix=fix))
    return problems + _language_problems(settings.language)


def _language_problems(language: Language | None) -> list[Problem]:
    return [
        Problem(f"data.gates.language.allow: '{code}' is not a known language", fix=nearest(code, LANGUAGES))
        for code in (language.allow if language else ())
        if code not in LANGUAGES
    ]
