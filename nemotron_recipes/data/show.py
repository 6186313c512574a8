"""One row of prepared data as a trainer sees it: its tokens as text, and which of them are learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_recipes.data.indexed import read_document
from nemotron_recipes.data.packed import PARQUET, PackedSplit
from nemotron_recipes.data.packs_in import packs_of_npy
from nemotron_recipes.data.settings import SPLITS
from nemotron_recipes.data.writers import MEGATRON_NAMES
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.fsio import file_digest

ANSWERS = {"dpo": ("chosen", "rejected"), "kto": ("completion",), "rl": ()}


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens that are all learned, or all not."""

    text: str
    tokens: int
    learned: bool


@dataclass(frozen=True)
class Part:
    """A sequence; of preference rows: the prompt with one answer."""

    title: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Shown:
    """Row `number` of `rows` in a split."""

    split: str
    number: int
    rows: int
    parts: tuple[Part, ...]
    facts: dict[str, str]


def read_metadata(folder: Path) -> dict[str, Any]:
    """UserError: the folder holds no prepared data."""
    try:
        found: dict[str, Any] = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        fix = "give the name of a data artifact, or the folder that `data prep` wrote"
        raise UserError(Problem(f"no prepared data in {folder}: {error}", fix=fix)) from None


def load_tokenizer(folder: Path, metadata: dict[str, Any]) -> Any:
    """The tokenizer that made the data. UserError: another one, or none."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(Problem(f"no tokenizer.json in {folder}", fix="--tokenizer FOLDER"))
    if file_digest(path) != metadata["tokenizer"]["digest"]:
        what = f"{path} is not the tokenizer that made these data"
        raise UserError(Problem(what, fix="--tokenizer FOLDER names another one"))
    return Tokenizer.from_file(str(path))


def show_row(folder: Path, metadata: dict[str, Any], tokenizer: Any, split: str, number: int) -> Shown:
    """Row `number`, from 0, of a split. UserError: there is none, or a file is damaged."""
    if split not in SPLITS:
        raise UserError(Problem(f"there is no split '{split}'", fix=nearest(split, SPLITS)))
    if "converted_from" in metadata and metadata["format"] not in PACKS:
        fix = "show the data that these were converted from"
        raise UserError(Problem(f"rows in the layout {metadata['format']} can't be shown", fix=fix))
    show = {"sft": _sequence, "pretrain": _document}.get(metadata["method"], _answers)
    try:
        return show(folder, metadata, tokenizer, split, number)
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = f"split '{split}' of {folder} is not as data prep wrote it: {error!r}"
        raise UserError(Problem(what, fix="prepare anew")) from None


def _sequence(folder: Path, metadata: dict[str, Any], tokenizer: Any, split: str, number: int) -> Shown:
    rows = metadata["splits"][split]["sequences"]
    _check(number, rows, split)
    at, pack, ids, mask = PACKS[metadata["format"]](folder, split, number)
    learned: np.ndarray = np.append(np.uint8(0), mask[:-1])  # the mask says what comes next
    facts = {"pack": f"{pack}, from token {at}", "tokens": str(len(ids)), "learned": str(int(learned.sum()))}
    return Shown(split, number, rows, (Part("sequence", _pieces(tokenizer, ids, learned)),), facts)


def _document(folder: Path, metadata: dict[str, Any], tokenizer: Any, split: str, number: int) -> Shown:
    rows = metadata["splits"][split]["sequences"]
    _check(number, rows, split)
    prefix, ids = read_document(folder, split, number)
    pieces = _pieces(tokenizer, ids, np.ones(len(ids), dtype=np.uint8))
    return Shown(split, number, rows, (Part("document", pieces),), {"set": prefix, "tokens": str(len(ids))})


def _native(folder: Path, split: str, number: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    data = PackedSplit(folder / split)
    pack = int(np.searchsorted(data.seq_offsets, number, side="right")) - 1
    return _cut(data[pack], number - int(data.seq_offsets[pack]), pack)


def _npy(folder: Path, split: str, number: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Such a file has to be read from its start."""
    for pack, (ids, mask, starts) in enumerate(packs_of_npy(folder / f"{MEGATRON_NAMES[split]}.npy")):
        if number < len(starts):
            return _cut({"input_ids": ids, "loss_mask": mask, "seq_start_id": starts}, number, pack)
        number -= len(starts)
    raise UserError(Problem(f"{folder} holds fewer sequences than its metadata say"))


def _parquet(folder: Path, split: str, number: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    from pyarrow import parquet

    file = parquet.ParquetFile(folder / split / PARQUET)
    pack = 0
    for group in range(file.num_row_groups):
        counts = np.array([len(one) for one in file.read_row_group(group, ["seq_start_id"])["seq_start_id"]])
        ends = np.cumsum(counts)
        if number < ends[-1]:
            at = int(np.searchsorted(ends, number, side="right"))
            row = file.read_row_group(group).slice(at, 1).to_pylist()[0]
            columns = {name: np.array(values) for name, values in row.items()}
            return _cut(columns, number - int(ends[at] - counts[at]), pack + at)
        number -= int(ends[-1])
        pack += len(counts)
    raise UserError(Problem(f"{folder} holds fewer sequences than its metadata say"))


PACKS = {"native": _native, "parquet": _parquet, "megatron_npy": _npy}


def _cut(pack: dict[str, np.ndarray], place: int, number: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    bounds = [*pack["seq_start_id"].tolist(), len(pack["input_ids"])]
    start, end = bounds[place], bounds[place + 1]
    return start, number, pack["input_ids"][start:end], pack["loss_mask"][start:end]


def _answers(folder: Path, metadata: dict[str, Any], tokenizer: Any, split: str, number: int) -> Shown:
    rows = metadata["splits"][split]["sequences"]
    _check(number, rows, split)
    with (folder / split / "rows.jsonl").open(encoding="utf-8") as handle:
        row = json.loads(next(islice(handle, number, None)))
    prompt = row["prompt_ids"]
    parts = []
    for name in ANSWERS[metadata["method"]] or ("",):
        answer = row[f"{name}_ids"] if name else []
        learned: np.ndarray = np.repeat([0, 1], [len(prompt), len(answer)])
        parts.append(Part(name or "prompt", _pieces(tokenizer, [*prompt, *answer], learned)))
    facts = {key: json.dumps(row[key], ensure_ascii=False) for key in ("label", "expected_answer") if key in row}
    return Shown(split, number, rows, tuple(parts), facts)


def _check(number: int, rows: int, split: str) -> None:
    if not rows:
        raise UserError(Problem(f"the {split} split is empty"))
    if not 0 <= number < rows:
        raise UserError(Problem(f"there is no row {number} in {split}", fix=f"rows are 0 to {rows - 1}"))


def _pieces(tokenizer: Any, ids: Sequence[int] | np.ndarray, learned: np.ndarray) -> tuple[Piece, ...]:
    return tuple(
        Piece(tokenizer.decode(list(map(int, ids[a:b])), skip_special_tokens=False), b - a, bool(learned[a]))
        for a, b in _runs(learned)
    )


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    bounds = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    return ((a, b) for a, b in pairwise(bounds) if b > a)
