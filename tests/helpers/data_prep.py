"""What the tests of data preparation share: tokenizers, files of rows, one call to prepare them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nemotron_recipes.data.encoder import Encoder
from nemotron_recipes.data.gates.build import build_gates
from nemotron_recipes.data.job import Job, Report
from nemotron_recipes.data.metadata import write_metadata
from nemotron_recipes.data.prepare import prepare
from nemotron_recipes.data.rows import RowReader
from nemotron_recipes.data.settings import Columns, read_settings
from nemotron_recipes.data.template import NO_TEMPLATE, template_source
from nemotron_recipes.tiny.tokenizer import MARKER_TOKENS, SPECIAL_TOKENS, write_tokenizer

TEMPLATE = template_source("nemotron3")
# Llama 3's and GPT-4's way to cut text: newlines join what stands before them, so merges cross line ends.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT = """assistant user system\n\n think of the tools <tool> a call, and then\n\n\n another </call> one.
assistant\n\n
def f(x):\n    return {"a": x}\n\n# Tools\n\nYou have access to the following functions:\n
\n12 + 30 = 42. (yes)\n\n!?\n"""


@cache
def tiny_folder() -> Path:
    folder = Path(mkdtemp(prefix="tiny-tokenizer-"))
    write_tokenizer(folder)
    return folder


@cache
def merging_folder() -> Path:
    """A byte-level BPE whose tokens join punctuation, newlines and letters, as large vocabularies do."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator([_TEXT] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in MARKER_TOKENS])
    tokenizer.add_tokens([AddedToken("        ", normalized=False, special=False)])  # no control token
    folder = Path(mkdtemp(prefix="merging-tokenizer-"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@cache
def encoder(name: str = "tiny") -> Encoder:
    return Encoder({"tiny": tiny_folder, "merging": merging_folder}[name](), TEMPLATE)


def read_row(row: Any, method: str = "sft", columns: dict[str, str] | None = None, pattern: str | None = None) -> Any:
    return RowReader(method, Columns(**(columns or {})), pattern).read(row)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str, **extra: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **extra}


def run_prepare(
    output: Path,
    files: list[Path],
    method: str = "sft",
    source: dict[str, Any] | None = None,
    template: str = TEMPLATE,
    folder: Path | None = None,
    **data: Any,
) -> tuple[Report, dict[str, Any]]:
    """Prepare `files`, one source each, with the tiny tokenizer or that in `folder`; all rows to train unless said
    otherwise."""
    output.mkdir(parents=True)
    sources = [{"path": str(file), **(source or {"split": "train"})} for file in files]
    tree = {"sources": sources, "tokenizer": "tiny", "pack_size": 128, "thinking": False, **data}
    settings = read_settings(tree, method)
    contamination = settings.gates and settings.gates.contamination
    evaluations = tuple(Path(file) for file in contamination.files) if contamination else ()
    template = NO_TEMPLATE if settings.chat_template is None else template
    gates = build_gates(settings.gates, evaluations)
    job = Job(method, settings, tuple(files), folder or tiny_folder(), template, gates)
    report = prepare(job, output)
    return report, write_metadata(job, report, output)


def rows_of(output: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / split / "rows.jsonl").read_text().splitlines()]


def bytes_of(output: Path) -> dict[str, bytes]:
    return {p.relative_to(output).as_posix(): p.read_bytes() for p in output.rglob("*") if p.is_file()}
