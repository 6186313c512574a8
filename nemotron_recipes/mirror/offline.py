"""What a trainer's own W&B logging left in a stage's folder: the SDK's files of offline runs, read record by record.

The SDK can only send such a file whole (`wandb sync`): when the attempt is over, once more after an interruption, and
steps that a later attempt repeats under new numbers. So the mirror reads it while it grows, and tells W&B the steps
that aren't there. Format: the log format of LevelDB (blocks of 32 KiB; checksum, length, kind before each part) with
`wandb.proto` messages in it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from nemotron_recipes.mirror.media import Media
from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import Tree

MAGIC, VERSION = b":W&B", 0
HEADER = 7
BLOCK = 32 * 1024
PART = struct.Struct("<IHB")  # checksum, length in bytes, kind
FULL, MIDDLE, LAST = 1, 3, 4
FOLDERS = ("wandb", "nemo_rl/exp_*/wandb/wandb")  # in the stage's folder; the second is NeMo-RL's own idea
COUNTED = "train/global_step"  # a trainer that leaves the number of the step to the SDK says it so (transformers)


@dataclass
class Logged:
    """config: what the trainer gave `wandb.init` and `run.config`; rows: step -> what it logged;
    whole: it ended well, so nothing comes any more."""

    config: Tree = field(default_factory=dict)
    rows: dict[int, Tree] = field(default_factory=dict)
    whole: bool = False


class OfflineFile:
    """One attempt's file, read on from where the last reading ended."""

    def __init__(self, path: Path):
        self.path = path
        self.logged = Logged()
        self.at = HEADER
        self.record = b""  # parts of a record whose last one is still to come
        self.step: int | None = None

    def read(self, ended: bool = True) -> Logged:
        """All that stands there so far; an end cut short is left out. ValueError: it is no such file.

        ended: nobody writes any more, so that what can't be read is damage.
        """
        from google.protobuf.message import DecodeError
        from wandb.proto import wandb_internal_pb2

        for data in self._records(ended):
            try:
                record = wandb_internal_pb2.Record.FromString(data)
            except DecodeError as error:
                raise ValueError(f"{self.path} can't be read: {error}") from None
            kind = record.WhichOneof("record_type")
            if kind == "run":
                _update(self.logged.config, record.run.config.update)
            elif kind == "config":
                _update(self.logged.config, record.config.update)
            elif kind == "history":
                self._row(record.history)
            elif kind == "exit":
                self.logged.whole = True
        self.logged.config.pop("_wandb", None)
        return self.logged

    def _row(self, history: Any) -> None:
        row: Tree = {}
        _update(row, history.item)
        self.step = row.get(COUNTED, self.step)
        step = int(row["_step"]) if "_step" in row else history.step.num
        folder = self.path.parent / "files"
        kept = {k: Media.of(value, folder) or value for k, value in row.items() if not k.startswith("_")}
        self.logged.rows.setdefault(step if self.step is None else int(self.step), {}).update(kept)

    def _records(self, ended: bool) -> Iterator[bytes]:
        """The records; reading ends at one that is not whole yet."""
        with open(self.path, "rb") as file:
            head = file.read(HEADER)
            if len(head) < HEADER:
                return
            if head[:4] != MAGIC or head[6] != VERSION:
                raise ValueError(f"{self.path} is no file of the W&B SDK that this version can read")
            file.seek(self.at)
            start, data = self.at, file.read()
        while True:
            left = BLOCK - self.at % BLOCK
            at = self.at + (left if left < PART.size else 0)  # too short for a part: zeros
            begin = at - start + PART.size
            if begin > len(data):
                return
            check, length, kind = PART.unpack_from(data, begin - PART.size)
            if begin + length > len(data):
                return
            part = data[begin : begin + length]
            if not (check or length or kind):  # room that the SDK has not used
                return
            if crc32(bytes([kind]) + part) != check:
                if ended:
                    raise ValueError(f"{self.path} is damaged: what stands at byte {at} isn't what the SDK wrote")
                return
            self.at = at + PART.size + length
            self.record = self.record + part if kind in (MIDDLE, LAST) else part
            if kind in (FULL, LAST):
                yield self.record


def offline_files(stage: StageDir, run_id: str) -> list[Path]:
    """The files of every attempt, oldest first."""
    found = (stage.path.glob(f"{folder}/offline-run-*-{run_id}/*.wandb") for folder in FOLDERS)
    return sorted((path for paths in found for path in paths), key=lambda path: path.parent.name)


def _update(tree: Tree, items: Any) -> None:
    for item in items:
        *path, name = item.nested_key or [item.key]
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place[name] = json.loads(item.value_json)
