"""Megatron's indexed data sets: PREFIX.bin with the tokens, PREFIX.idx with where each sequence stands, and the file
that says how much of which set a training takes."""

from __future__ import annotations

import json
import re
import struct
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nemotron_recipes.data.writers import Packs, Written
from nemotron_recipes.errors import Problem, UserError

BLEND = "blend.json"
_PARTS = {"train": "train", "validation": "valid", "test": "test"}  # Megatron's names of the splits
_HEAD = struct.Struct("<9sQBQQ")
_MAGIC, _INT32 = b"MMIDIDX\x00\x00", 4


def write_indexed(prefix: Path, packs: Packs, order: np.ndarray) -> Written:
    """One split as Megatron's indexed dataset PREFIX.bin and PREFIX.idx, every sequence a document of its own.

    The .idx, little-endian: magic, version 1, code 4 (int32), sequences, documents; then lengths (int32), byte offsets
    (int64) and document bounds (int64) - megatron/core/datasets/indexed_dataset.py. Masks have no place in it."""
    written = Written()
    lengths = array("i")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with prefix.with_name(f"{prefix.name}.bin").open("wb") as handle:
        for number in order.tolist():
            ids, mask, starts = packs.read(number, number + 1)
            handle.write(ids.astype("<i4", copy=False).tobytes())
            lengths.extend(np.diff(np.append(starts, len(ids))).tolist())
            written.add(ids, mask)
    sizes = np.array(lengths, dtype="<i4")
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[:-1] * 4
    with prefix.with_name(f"{prefix.name}.idx").open("wb") as handle:
        handle.write(_HEAD.pack(_MAGIC, 1, _INT32, len(sizes), len(sizes) + 1))
        handle.write(sizes.tobytes())
        handle.write(offsets.astype("<i8").tobytes())
        handle.write(np.arange(len(sizes) + 1).astype("<i8").tobytes())
    return written


def write_blend(folder: Path, prefixes: Mapping[str, Sequence[tuple[float, str]]]) -> None:
    """`folder`/blend.json: {"train": [weight, prefix, ...], "valid": [...], "test": [...]}, prefixes below `folder`."""
    tree = {_PARTS[split]: [word for weight, prefix in sets for word in (f"{weight:g}", prefix)]
            for split, sets in prefixes.items() if sets}  # fmt: skip
    (folder / BLEND).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def read_document(folder: Path, split: str, number: int) -> tuple[str, np.ndarray]:
    """(prefix, ids) of document `number` of a split, counted through all its sets. UserError: there is none."""
    tree = json.loads((folder / BLEND).read_text(encoding="utf-8"))
    left = number
    for prefix in tree.get(_PARTS[split], [])[1::2]:
        with (folder / f"{prefix}.idx").open("rb") as handle:
            magic, version, kind, count, _ = _HEAD.unpack(handle.read(_HEAD.size))
            if (magic, version, kind) != (_MAGIC, 1, _INT32):
                raise UserError(Problem(f"{folder / prefix}.idx is no index of int32 tokens"))
            sizes = np.frombuffer(handle.read(4 * count), "<i4")
        if left < count:
            start = int(sizes[:left].sum(dtype=np.int64)) * 4
            return prefix, np.fromfile(folder / f"{prefix}.bin", "<i4", int(sizes[left]), offset=start)
        left -= count
    raise UserError(Problem(f"there is no document {number} in {split}"))


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name)[:80] or "data"
