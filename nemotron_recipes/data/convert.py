"""Prepared data in another layout, without tokenising again: from an artifact's folder to a new folder.

Packed sequences go between native columns, parquet and Megatron-Bridge's .npy, also to another pack size, and on to
Megatron's .bin/.idx with one document per sequence. Preference and RL rows go to the JSON Lines of TRL or NeMo-RL,
without ids, as those trainers tokenise themselves; and from one of these to the other.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nemotron_recipes.data.card import convert_card
from nemotron_recipes.data.indexed import BLEND, write_indexed
from nemotron_recipes.data.layouts import write_rows
from nemotron_recipes.data.packed import PARQUET, PackedSplit
from nemotron_recipes.data.packing import Packing, packing
from nemotron_recipes.data.packs_in import read_split
from nemotron_recipes.data.settings import SPLITS
from nemotron_recipes.data.writers import (
    MEGATRON_NAMES,
    Packs,
    Written,
    starts_in_packs,
    write_megatron,
    write_native,
    write_parquet,
)
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.fsio import file_digest, files_below, fsync_tree, write_atomic

PACKED = ("native", "parquet", "megatron_npy", "megatron_indexed")
ROWS = ("trl", "nemo_rl")


class PackedReader:
    """The packs of a native split, or its sequences packed anew. See `writers.Packs`."""

    def __init__(self, split: PackedSplit, pack_size: int | None):
        counts = np.diff(split.seq_offsets)
        self._split = split
        self._starts = split.seq_start_id + np.repeat(split.pack_offsets[:-1], counts)
        ends = np.concatenate([self._starts[1:], split.pack_offsets[-1:]]) if len(self._starts) else self._starts
        self._lengths = (ends - self._starts).astype(np.int32)
        if pack_size is None:
            every: np.ndarray = np.arange(len(self._starts), dtype=np.int64)
            packed = Packing(every, np.array(split.seq_offsets), np.diff(split.pack_offsets))
        else:
            longest = int(self._lengths.max(initial=0))
            if longest > pack_size:
                what = f"a sequence of {longest} tokens doesn't fit into packs of {pack_size}"
                raise UserError(Problem(what, fix="prepare with that data.pack_size: what is tokenised is taken over"))
            packed = packing(self._lengths, pack_size)
        self._order, self.offsets, self.tokens = packed.sequences, packed.offsets, packed.tokens

    def read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        members = self._order[self.offsets[first] : self.offsets[last]]
        spans = [slice(int(self._starts[i]), int(self._starts[i] + self._lengths[i])) for i in members]
        starts = starts_in_packs(self._lengths[members], self.tokens[first:last], self.offsets[first:last])
        ids = np.concatenate([self._split.input_ids[span] for span in spans])
        return ids, np.concatenate([self._split.loss_mask[span] for span in spans]), starts


def convert(source: Path, target: Path, layout: str, pack_size: int | None = None) -> dict[str, Any]:
    """Write `source` (a folder that data prep made) as `layout` into the new folder `target`; returns its metadata.
    A crash leaves no `target`. UserError: what can't be converted."""
    metadata = _read_metadata(source)
    _check(source, target, metadata, layout, pack_size)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir(parents=True)
    try:
        for name in ("chat_template.jinja", "bad_rows.jsonl"):
            if (source / name).exists():
                shutil.copyfile(source / name, temporary / name)
        if layout in PACKED:
            with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
                _convert_packs(source, temporary, metadata, layout, pack_size, Path(scratch))
        else:
            given = metadata["format"]
            for split in SPLITS:
                rows = source / split / "rows.jsonl" if given == "native" else source / f"{split}.jsonl"
                write_rows(rows, temporary / f"{split}.jsonl", metadata["method"], layout, given)
        metadata |= {"format": layout, "converted_from": file_digest(source / "metadata.json")}
        convert_card(source, temporary, metadata)
        metadata["files"] = {
            path.relative_to(temporary).as_posix(): {"digest": file_digest(path), "bytes": path.stat().st_size}
            for path in files_below(temporary)
        }
        text = json.dumps(metadata, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomic(temporary / "metadata.json", text.encode("utf-8", "backslashreplace"))
        fsync_tree(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return metadata


def _check(source: Path, target: Path, metadata: dict[str, Any], layout: str, pack_size: int | None) -> None:
    method, given = metadata["method"], metadata["format"]
    if method == "pretrain":
        fix = f"point a training at its {BLEND}"
        raise UserError(Problem("pretraining data are Megatron's indexed data sets already", str(source), fix))
    problems = []
    layouts = PACKED if method == "sft" else ROWS
    if layout not in PACKED + ROWS:
        what = f"there is no layout '{layout}'"
        problems.append(Problem(what, fix=nearest(layout, layouts) or f"valid: {', '.join(layouts)}"))
    elif given == "megatron_indexed":
        what = "these data are token ids without loss masks: they can't become anything else"
        problems.append(Problem(what, str(source), "convert what they were made from"))
    elif layout in ROWS and method == "sft":
        what = f"'{layout}' holds conversations, and these data are packed token ids: the messages are not in them"
        problems.append(Problem(what, str(source), f"valid: {', '.join(PACKED)}"))
    elif layout in PACKED and method != "sft":
        what = f"{method} rows are not packed, and '{layout}' holds packed token ids"
        if layout == "native" and given in ROWS:
            what = f"'{given}' holds no token ids, which the native layout has"
        problems.append(Problem(what, str(source), "prepare them: data prep reads TRL's rows; valid: trl, nemo_rl"))
    if method == "kto" and layout == "nemo_rl":
        problems.append(Problem("NeMo-RL reads no KTO rows", fix="--to trl"))
    if pack_size is not None and layout not in PACKED:
        problems.append(Problem("--pack-size is for packed sequences", "command line"))
    if target.exists():
        problems.append(Problem(f"{target} is there already", fix="name a folder that doesn't exist"))
    if problems:
        raise UserError(*problems)


def _convert_packs(
    source: Path, target: Path, metadata: dict[str, Any], layout: str, pack_size: int | None, scratch: Path
) -> None:
    for split in SPLITS:
        given = read_split(source, split, metadata["format"], metadata["splits"][split], scratch)
        packs = PackedReader(given, pack_size)
        order = np.arange(len(packs.tokens))
        if pack_size is not None:  # as data prep does it
            order = np.random.Generator(np.random.PCG64(0)).permutation(len(order))
        _writer(layout, target, split)(packs, order)
        facts = metadata["splits"][split]
        facts["packs"] = len(order)
        if pack_size is not None:
            metadata["pack_size"] = pack_size
        if len(order):
            facts["packing_efficiency"] = round(facts["tokens"] / (len(order) * metadata["pack_size"]), 6)
        rows = source / split / "rows.jsonl"
        if rows.exists():
            (target / split).mkdir(exist_ok=True)
            shutil.copyfile(rows, target / split / "rows.jsonl")


def _writer(layout: str, target: Path, split: str) -> Callable[[Packs, np.ndarray], Written]:
    places: dict[str, Callable[[Packs, np.ndarray], Written]] = {
        "native": lambda packs, order: write_native(target / split, packs, order),
        "parquet": lambda packs, order: write_parquet(target / split / PARQUET, packs, order),
        "megatron_npy": lambda packs, order: write_megatron(target / f"{MEGATRON_NAMES[split]}.npy", packs, order),
        "megatron_indexed": lambda packs, order: write_indexed(target / split / "text_document", packs, order),
    }
    return places[layout]


def _read_metadata(source: Path) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = json.loads((source / "metadata.json").read_text(encoding="utf-8"))
        return {**metadata, "method": metadata["method"], "format": metadata["format"]}
    except (OSError, ValueError, KeyError) as error:
        what = f"{source} is nothing that data prep made: {error}"
        raise UserError(Problem(what, fix="give artifact NAME[:VERSION] or its folder")) from None
