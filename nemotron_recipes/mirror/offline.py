"""What a trainer's own W&B logging left in a stage's folder: the SDK's files of offline runs, read record by record.

The SDK can only send such a file whole (`wandb sync`): once more after an interruption, and steps that a later attempt
repeats under new numbers. So the mirror reads it, and tells W&B the steps that aren't there. Format: the log format of
LevelDB (blocks of 32 KiB; checksum, length, kind before each part) with `wandb.proto` messages in it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import Tree

MAGIC, VERSION = b":W&B", 0
BLOCK = 32 * 1024
PART = struct.Struct("<IHB")  # checksum, length in bytes, kind
FULL, MIDDLE, LAST = 1, 3, 4


@dataclass
class Logged:
    """config: what the trainer gave `wandb.init` and `run.config`; rows: step -> what it logged, without files;
    whole: it ended well, so nothing comes any more."""

    config: Tree = field(default_factory=dict)
    rows: dict[int, Tree] = field(default_factory=dict)
    whole: bool = False


def offline_files(stage: StageDir, run_id: str) -> list[Path]:
    """The files of every attempt, oldest first."""
    return sorted(stage.path.glob(f"wandb/offline-run-*-{run_id}/*.wandb"))


def read_offline(path: Path) -> Logged:
    """What stands in the file so far; an end cut short is left out. ValueError: it is no such file."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    logged = Logged()
    for data in _records(path):
        try:
            record = wandb_internal_pb2.Record.FromString(data)
        except DecodeError as error:
            raise ValueError(f"{path} can't be read: {error}") from None
        kind = record.WhichOneof("record_type")
        if kind == "run":
            _update(logged.config, record.run.config.update)
        elif kind == "config":
            _update(logged.config, record.config.update)
        elif kind == "history":
            row: Tree = {}
            _update(row, record.history.item)
            step = int(row["_step"]) if "_step" in row else record.history.step.num
            kept = {key: value for key, value in row.items() if not key.startswith("_") and not _is_file(value)}
            logged.rows.setdefault(step, {}).update(kept)
        elif kind == "exit":
            logged.whole = True
    logged.config.pop("_wandb", None)
    return logged


def _is_file(value: Any) -> bool:
    """A table or picture: the row only points to its file."""
    return isinstance(value, dict) and "_type" in value and "path" in value


def _update(tree: Tree, items: Any) -> None:
    for item in items:
        *path, name = item.nested_key or [item.key]
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place[name] = json.loads(item.value_json)


def _records(path: Path) -> Iterator[bytes]:
    """The records; reading ends at one that is not whole yet."""
    data = path.read_bytes()
    if len(data) < 7:
        return
    if data[:4] != MAGIC or data[6] != VERSION:
        raise ValueError(f"{path} is no file of the W&B SDK that this version can read")
    at, record = 7, b""
    while True:
        left = BLOCK - at % BLOCK
        if left < PART.size:  # too short for a part: zeros
            at += left
        if at + PART.size > len(data):
            return
        check, length, kind = PART.unpack_from(data, at)
        at += PART.size
        if at + length > len(data):
            return
        part = data[at : at + length]
        if not (check or length or kind):  # room that the SDK has not used
            return
        if crc32(bytes([kind]) + part) != check:
            raise ValueError(f"{path} is damaged: what stands at byte {at - PART.size} isn't what the SDK wrote")
        at += length
        record = record + part if kind in (MIDDLE, LAST) else part
        if kind in (FULL, LAST):
            yield record
