"""What a shard became, on disk: whole or absent, named by what it follows from, so that a later run can take it over.

index.npz    one entry per row: line, status, split, point, sequences, payload_end, length, tokens
             one entry per sequence: seq_length, seq_first (position of the first label to learn, -1: none)
ids, mask    the sequences one after another: int32 ids; uint8 masks aligned to labels
payload      JSON Lines of what rows carry besides (held-out rows; preference and RL rows)
bad.jsonl    line, reason, detail of bad rows
signatures-N of corpus gate N: uint8 [kept rows, width]
facts.json   lines and rows read, reasons, what row gates counted; sealed, with sizes and checksums of the other files
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from nemotron_recipes.fsio import fsync_folder, fsync_tree
from nemotron_recipes.seals import opened, sealed

BUFFER = 1 << 20  # bytes
KEPT = -1  # status of a row that goes on; else an index into `reasons`
ROW_COLUMNS = {
    "line": "q", "status": "i", "split": "b", "point": "d", "sequences": "i", "payload_end": "q", "length": "i",
    "tokens": "q",
}  # fmt: skip
_INT32 = np.dtype("<i4")
SEQUENCE_COLUMNS = {"seq_length": "i", "seq_first": "i"}


@dataclass
class Tally:
    """What row gates counted in a shard: gate -> reason -> [rows, first examples]; and their CPU seconds."""

    counts: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class SpoolWriter:
    """Grows in a private folder; `finish` moves it into place."""

    def __init__(self, root: Path, key: str, signatures: int):
        self._place = root / key
        self._folder = root / f".{key}.{uuid.uuid4().hex}.tmp"
        self._folder.mkdir(parents=True)
        self._columns = {name: array(kind) for name, kind in (ROW_COLUMNS | SEQUENCE_COLUMNS).items()}
        self._appends: list[Any] = [self._columns[name].append for name in ROW_COLUMNS]
        names = ["ids", "mask", "payload", "bad.jsonl", *(f"signatures-{n}" for n in range(signatures))]
        self._files: dict[str, IO[bytes]] = {name: (self._folder / name).open("wb", BUFFER) for name in names}
        self._ids, self._mask = self._files["ids"], self._files["mask"]
        self._lengths, self._firsts = self._columns["seq_length"], self._columns["seq_first"]
        self._reasons: dict[str, int] = {}
        self._payload = 0
        self.bad_rows = 0
        self.rows = 0
        self.lines = 0

    def drop(self, line: int, reason: str, detail: str | None) -> None:
        """A row that is left out; with a `detail` it is listed among the bad rows."""
        self._row(line, self._reasons.setdefault(reason, len(self._reasons)), 0, 0.0, 0, 0, 0)
        if detail is not None:
            self.bad_rows += 1
            entry = {"line": line, "reason": reason, "detail": detail}
            self._files["bad.jsonl"].write(json.dumps(entry, ensure_ascii=True).encode() + b"\n")

    def keep(
        self,
        line: int,
        split: int,
        point: float,
        sequences: Sequence[tuple[np.ndarray, bytes]],
        payload: bytes,
        length: int,
        tokens: int,
        signatures: Sequence[bytes],
    ) -> None:
        """A row that goes on. `sequences`: ids and label-aligned masks as bytes; `length`, `tokens`: where none are."""
        for ids, learned in sequences:
            self._ids.write(ids.astype(_INT32, copy=False).tobytes())
            self._mask.write(learned)
            self._lengths.append(len(ids))
            self._firsts.append(learned.find(1))
        if payload:
            self._files["payload"].write(payload)
            self._payload += len(payload)
        for number, signature in enumerate(signatures):
            self._files[f"signatures-{number}"].write(signature)
        self._row(line, KEPT, split, point, len(sequences), length, tokens)

    def finish(self, tally: Tally) -> None:
        """Complete and durable, under its name."""
        np.savez(
            self._folder / "index.npz", **{n: np.frombuffer(c, dtype=c.typecode) for n, c in self._columns.items()}
        )
        for handle in self._files.values():
            handle.close()
        facts = {
            "lines": self.lines,
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "reasons": list(self._reasons),
            "gates": tally.counts,
            "files": {path.name: _checked(path) for path in sorted(self._folder.iterdir())},
        }
        (self._folder / "facts.json").write_text(
            json.dumps(sealed(facts, "spool"), ensure_ascii=True), encoding="ascii"
        )
        fsync_tree(self._folder)
        try:
            os.rename(self._folder, self._place)
        except OSError:
            if is_whole(self._place):  # another run was quicker, with the same bytes
                shutil.rmtree(self._folder)
            else:
                remove_spool(self._place)
                os.rename(self._folder, self._place)
        fsync_folder(self._place.parent)

    def discard(self) -> None:
        for handle in self._files.values():
            handle.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _row(self, line: int, status: int, split: int, point: float, sequences: int, length: int, tokens: int) -> None:
        values = (line, status, split, point, sequences, self._payload, length, tokens)
        for append, value in zip(self._appends, values, strict=True):
            append(value)
        self.rows += 1


def is_whole(folder: Path) -> bool:
    """It is renamed into place with everything in it; whoever cleans up by hand may stop half-way, and disks forget."""
    try:
        files = Spool(folder).facts["files"]
        return all(_checked(folder / name) == known for name, known in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _checked(path: Path) -> list[int]:
    """[bytes, their CRC-32]: enough against accidents, and many times faster than what filled the file."""
    size = check = 0
    room = memoryview(bytearray(1 << 18))
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(room):
            size, check = size + count, zlib.crc32(room[:count], check)
    return [size, check]


def remove_spool(folder: Path) -> None:
    """At no moment does a part of it stand under its name."""
    hidden = folder.with_name(f".{folder.name.lstrip('.')}.{uuid.uuid4().hex}.tmp")
    try:
        os.rename(folder, hidden)
    except FileNotFoundError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


class Spool:
    """A finished shard, to read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts: dict[str, Any] = opened(json.loads((folder / "facts.json").read_text(encoding="ascii")))

    def index(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "index.npz", allow_pickle=False) as columns:
            return {name: columns[name] for name in columns.files}
