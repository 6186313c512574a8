"""The TensorBoard files that a trainer writes, as lines of metrics.jsonl while it trains.

Read here and not by the package tensorboard, which loads TensorFlow where it finds it, into the process that trains.
The format: records of length (8 bytes), its checksum (4), content, its checksum (4), little-endian, as in
tensorboard/summary/writer/record_writer.py; the content is a protobuf message (tensorboard/compat/proto/event.proto and
summary.proto), of which a few fields are read. Standard library.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.metrics import append, forget_after

VALIDATION = "validation_"  # figures whose names begin so get a line of their own, without `loss`
_HEADER, _FOOTER = 12, 4  # bytes


class EventMetrics:
    """Rank 0: `with metrics: train()`, where `metrics.look` is called now and then.

    folder  where the trainer writes; subfolders are not read
    name    what a tag is called in metrics.jsonl; None: it is left out. Tags whose step is no training step must be
    start   steps that were done before; the lines of later ones are forgotten first

    A step is told once a later one has begun, or at the end, since its figures come one by one.
    """

    def __init__(self, context: Context, folder: Path, name: Callable[[str], str | None], start: int, steps: int):
        self.context, self.folder, self.name, self.steps = context, folder, name, steps
        self._read: dict[Path, int] = {}  # bytes
        self._open: dict[int, dict[str, float]] = {}  # step -> figures that are not told yet
        self._times: dict[int, float] = {}
        if context.is_main:
            self._begin(start)

    def __enter__(self) -> EventMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.context.is_main:
            self._take(whole=True)

    def look(self) -> None:
        """Take over what has come since."""
        self._take(whole=False)

    def _begin(self, start: int) -> None:
        """What an attempt that was killed has logged, and its rank 0 has not told, is told now."""
        told = forget_after(self.context.dir.metrics, start)
        self._collect()
        append(self.context, (row for row in self._rows(whole=True) if told < row["step"] <= start))
        self._read = {file: file.stat().st_size for file in self._files()}  # nobody writes on

    def _take(self, whole: bool) -> None:
        try:
            self._collect()
            append(self.context, self._rows(whole))
            left = [file for file in self._files() if whole and file.stat().st_size > self._read[file]]
        except OSError as error:  # figures for people; they may not end a training
            print(f"warning: the metrics of the trainer can't be followed: {error}", file=sys.stderr)
            return
        for file in left:
            print(f"warning: {file} can't be read after {self._read[file]} bytes", file=sys.stderr)

    def _collect(self) -> None:
        for file in self._files():
            with open(file, "rb") as source:
                source.seek(self._read.get(file, 0))
                records, size = whole_records(source.read())
            self._read[file] = self._read.get(file, 0) + size
            for record in records:
                self._keep(record, file)

    def _keep(self, record: bytes, file: Path) -> None:
        try:
            found = list(scalars(record))
        except (ValueError, KeyError, IndexError, struct.error) as error:
            print(f"warning: a record of {file} can't be read: {error!r}", file=sys.stderr)
            return
        for time, step, tag, value in found:
            if (name := self.name(tag)) is not None:
                # The first one counts: Megatron-Bridge calls the loss on test rows, at the end, that of validation.
                self._open.setdefault(step, {}).setdefault(name, value)
                self._times.setdefault(step, time)

    def _rows(self, whole: bool) -> Iterator[dict[str, Any]]:
        newest = max(self._open, default=0)
        for step in sorted(self._open):
            if not whole and step == newest:
                break
            figures, time = self._open.pop(step), self._times.pop(step)
            common = {"step": step, "steps": self.steps, "time": round(time, 3)}
            for apart in (False, True):
                if found := {n: _number(v) for n, v in figures.items() if n.startswith(VALIDATION) == apart}:
                    yield {**common, **found}

    def _files(self) -> list[Path]:
        """The newest first, in whatever folder below; their names begin with the time at which they were made."""
        return sorted(self.folder.rglob("events.out.tfevents.*"), key=lambda file: file.name, reverse=True)


def whole_records(data: bytes) -> tuple[list[bytes], int]:
    """Contents of the records at the beginning of `data`, and the bytes they take. What is not whole yet is left."""
    found, at = [], 0
    while at + _HEADER <= len(data):
        length, check = struct.unpack_from("<QI", data, at)
        end = at + _HEADER + length + _FOOTER
        if masked_crc32c(data[at : at + 8]) != check or end > len(data):
            break
        content = data[at + _HEADER : end - _FOOTER]
        if (masked_crc32c(content),) != struct.unpack_from("<I", data, end - _FOOTER):
            break
        found.append(content)
        at = end
    return found, at


def scalars(record: bytes) -> Iterator[tuple[float, int, str, float]]:
    """(seconds since the epoch, step, tag, value) of each scalar of an Event: wall_time 1, step 2, summary 5."""
    event: dict[int, Any] = dict(_fields(record))
    (time,) = struct.unpack("<d", event.get(1, bytes(8)))
    for number, value in _fields(event.get(5, b"")):
        summary = dict(_fields(value)) if number == 1 else {}  # Summary.value: tag 1, simple_value 2
        if 1 in summary and 2 in summary:
            yield time, event.get(2, 0), summary[1].decode(), struct.unpack("<f", summary[2])[0]


def masked_crc32c(data: bytes) -> int:
    """The checksum of such records: CRC-32C (Castagnoli), turned by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC32C = _table()


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: an int of a varint, else bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[kind]  # groups, 3 and 4, are not used there
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if not byte & 0x80:
            return value, at


def _number(value: float) -> float | None:
    """As it was before it became a 32-bit float: seven digits. JSON has no NaN: null."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
