"""Packs in layouts of other tools, read back: parquet and Megatron-Bridge's .npy. Memory doesn't grow with the data."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from nemotron_recipes.data.packed import COLUMNS, PARQUET, PackedSplit
from nemotron_recipes.data.writers import MEGATRON_NAMES, write_columns
from nemotron_recipes.errors import Problem, UserError

NAMES = ("input_ids", "loss_mask", "seq_start_id")
Pack = tuple[np.ndarray, np.ndarray, np.ndarray]
_BATCH = 64  # packs of parquet at once

# Opcodes of pickle that push their argument, and those that make a tuple of the last values.
_VALUES = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES",
                     "BINBYTES", "SHORT_BINSTRING", "BINSTRING"})  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_THING = object()  # what numpy's own names and calls in a pickle stand for: nothing is called


def read_split(source: Path, split: str, layout: str, facts: dict[str, Any], scratch: Path) -> PackedSplit:
    """A split as native columns: those of `source`, or made of its other layout below `scratch`. `facts`: the split's
    in metadata.json. UserError: the file is not what data prep wrote."""
    if layout == "native":
        return PackedSplit(source / split)
    path = source / split / PARQUET if layout == "parquet" else source / f"{MEGATRON_NAMES[split]}.npy"
    packs = _of_parquet(path) if layout == "parquet" else packs_of_npy(path)
    try:
        write_columns(scratch / split, packs, facts["tokens"], facts["sequences"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(Problem(f"{path} is not as data prep wrote it: {error}", fix="prepare anew")) from None
    return PackedSplit(scratch / split)


def _of_parquet(path: Path) -> Iterator[Pack]:
    from pyarrow import parquet

    with path.open("rb") as handle:
        for batch in parquet.ParquetFile(handle).iter_batches(_BATCH, columns=list(NAMES)):
            columns = [batch.column(batch.schema.get_field_index(name)) for name in NAMES]
            for row in range(len(batch)):
                ids, mask, starts = (
                    column[row].values.to_numpy(zero_copy_only=False).astype(COLUMNS[name], casting="same_kind")
                    for name, column in zip(NAMES, columns, strict=True)
                )
                yield ids, mask, starts


def packs_of_npy(path: Path) -> Iterator[Pack]:
    """The packs of a file that `writers.write_megatron` or numpy wrote: an object array of dicts of lists. ValueError:
    it holds something else. It is a pickle, of which data alone are taken: nothing that it names is called."""
    with path.open("rb") as handle:
        if np.lib.format.read_magic(handle) != (1, 0):
            raise ValueError("no .npy file of version 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
        if dtype != np.dtype(object) or len(shape) != 1:
            raise ValueError("no list of packs")
        for pack in _dicts(handle):
            ids, mask, starts = (np.array(pack[name], dtype=COLUMNS[name]) for name in NAMES)
            yield ids, mask, starts


def _dicts(handle: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The dicts in the outermost list of a pickle, one at a time, by its opcodes."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        place = marks.pop()
        items = stack[place:]
        del stack[place:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(handle):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("APPENDS", "APPEND"):
            items = above_mark() if name == "APPENDS" else [stack.pop()]
            if items and isinstance(items[0], dict):
                yield from items
            else:
                stack[-1].extend(items)
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("SETITEMS", "SETITEM"):
            items = above_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            place = len(memo) if name == "MEMOIZE" else argument
            memo[place] = stack[-1] if isinstance(stack[-1], (str, bytes)) else _THING  # never what grows
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES or name == "TUPLE":
            items = above_mark() if name == "TUPLE" else [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(items))
        elif name in ("GLOBAL", "STACK_GLOBAL", "REDUCE"):
            if name != "GLOBAL":
                del stack[-2:]
            stack.append(_THING)
        elif name == "BUILD":
            stack.pop()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"a pickle with {name}")
