"""The rows of a shard, one at a time, each with its line. Memory doesn't grow with the shard."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import IO, Any, NamedTuple, NoReturn

import orjson

from nemotron_recipes.data.files import kind_of, open_input
from nemotron_recipes.data.hub_rows import hub_error, hub_stream
from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.shards import Shard
from nemotron_recipes.errors import Problem, UserError

MAX_LINE = 8 << 20  # bytes of one row: about two million tokens, more than any context
_BATCH = 256  # rows of parquet at once
_INT64 = 2.0**63
BLANK = object()  # the value of a blank line


class Line(NamedTuple):
    """One row as read. `number` counts from 1 within the shard: lines of text, rows of other formats. `bad` is set
    instead of `value` where it can't be read. A line whose value is BLANK is no row; it only counts as a line."""

    number: int
    value: Any = None
    bad: BadRow | None = None
    size: int = 0  # bytes of text, where that is known


def read_shard(shard: Shard) -> Iterator[Line]:
    """UserError: the file is damaged, can't be read, or needs a library that is missing."""
    try:
        yield from _READERS[shard.kind](shard)
    except (OSError, EOFError, zlib.error) as error:
        words = {"gzip": "damaged or cut off: ", "zstd": "damaged or cut off: "}.get(shard.kind, "")
        fix = "copy it again, or leave it out" if words else "check the file and its permissions"
        raise UserError(Problem(f"{shard.place} can't be read: {words}{error}", fix=fix)) from None


def count_rows(shard: Shard, most: int) -> int:
    """How many rows there are, up to `most`."""
    rows = (line for line in read_shard(shard) if line.value is not BLANK)
    return sum(1 for _ in islice(rows, most))


def _lines(shard: Shard) -> Iterator[Line]:
    with open_input(shard.place).open() as handle:
        position = shard.lo
        if position:
            # A line that starts just at `lo` is ours: only what follows the newline before it tells.
            handle.seek(position - 1)
            while piece := handle.readline(MAX_LINE):
                position += len(piece)
                if piece.endswith(b"\n") or position > shard.hi:
                    break
            position -= 1
        yield from _text_lines(handle, shard.first, shard.hi - position, None)


def _text_lines(handle: IO[bytes], first: bool, size: int | None, limit: int | None) -> Iterator[Line]:
    """Rows of JSON Lines from here on: of lines that start within `size` bytes, at most `limit`. Only a newline byte
    ends a line."""
    number = position = found = 0
    while (size is None or position < size) and (limit is None or found < limit):
        line = handle.readline(MAX_LINE + 1)
        if not line:
            return
        number += 1
        length = len(line)
        bad = None
        if length > MAX_LINE and not line.endswith(b"\n"):
            while piece := handle.readline(MAX_LINE):
                length += len(piece)
                if piece.endswith(b"\n"):
                    break
            bad = BadRow("line_too_long", f"{length} bytes; the longest row that is read has {MAX_LINE}")
        position += length
        if number == 1 and first:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if bad is None and not line.strip():
            yield Line(number, BLANK)
            continue
        found += 1
        yield Line(number, bad=bad) if bad else parse_line(line, number)


@contextmanager
def open_lines(place: str) -> Iterator[IO[bytes]]:
    """The text of a file of JSON Lines, .gz and .zst unpacked. UserError: it can't be read, now or while it is used."""
    kind = kind_of(place)
    try:
        with open_input(place).open() as raw:
            if kind not in ("gzip", "zstd"):
                yield raw
                return
            with _decompressor(kind, raw) as handle:
                yield handle
    except (OSError, EOFError, zlib.error) as error:
        words = "damaged or cut off: " if kind in ("gzip", "zstd") else ""
        raise UserError(Problem(f"{place} can't be read: {words}{error}")) from None


def _compressed(shard: Shard) -> Iterator[Line]:
    with open_input(shard.place).open() as raw, _decompressor(shard.kind, raw) as handle:
        yield from _text_lines(handle, True, None, shard.limit)


def _decompressor(kind: str, raw: IO[bytes]) -> IO[bytes]:
    if kind == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    try:
        import zstandard
    except ImportError:
        what = "reading .zst needs the package 'zstandard'"
        raise UserError(Problem(what, fix="pip install 'nemotron-recipes[data]'")) from None
    return io.BufferedReader(_Zstd(raw, zstandard), 1 << 20)


class _Zstd(io.RawIOBase):
    """A zstd stream of any number of frames. A stream that ends inside a frame is an error, not an end."""

    def __init__(self, raw: IO[bytes], library: Any):
        self._raw = raw
        self._library = library
        self._frame: Any = None
        self._held = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._held or self._raw.read(1 << 16)
            self._held = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is not complete")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(data)
            except self._library.ZstdError as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._held = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _json(shard: Shard) -> Iterator[Line]:
    """One JSON document: a list of rows, or an object in which one field is such a list."""
    with open_input(shard.place).open() as handle:
        data = handle.read()
    line = parse_line(data.removeprefix(b"\xef\xbb\xbf"), 1)
    rows = line.value
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if line.bad is not None or not isinstance(rows, list):
        why = line.bad.detail if line.bad is not None else "it holds no list of rows"
        raise UserError(Problem(f"{shard.place} is no JSON list: {why}", fix="one object per line is .jsonl"))
    for number, row in enumerate(rows[: shard.limit], 1):
        yield Line(number, row)


def parquet_file(place: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`. UserError: pyarrow is missing, or this is no parquet."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        what = "reading parquet needs the package 'pyarrow'"
        raise UserError(Problem(what, fix="pip install 'nemotron-recipes[data]'")) from None
    try:
        return parquet.ParquetFile(open_input(place).open())
    except pyarrow.ArrowException as error:
        raise UserError(Problem(f"{place} is no parquet file: {error}")) from None


def _parquet(shard: Shard) -> Iterator[Line]:
    number = 0
    file = parquet_file(shard.place)
    for batch in file.iter_batches(_BATCH, row_groups=list(range(shard.lo, shard.hi))):
        for row in batch.to_pylist():
            if shard.limit is not None and number >= shard.limit:
                return
            number += 1
            yield Line(number, plain(row))


def _sample(shard: Shard) -> Iterator[Line]:
    """Generated rows of `sample:TASK`; without a split they come from the task's training problems."""
    from nemotron_recipes.tiny.tasks import rows

    split, method = shard.task
    assert shard.limit is not None
    task = shard.place.removeprefix("sample:")
    for number, row in enumerate(rows(task, method, split or "train", shard.limit, shard.seed), 1):
        yield Line(number, row)


def _hub(shard: Shard) -> Iterator[Line]:
    """Rows of a hub data set, streamed. `lo` and `hi` count the data set's own files."""
    subset, split = shard.task
    data = hub_stream(shard.place, subset or None, split, shard.revision)
    if shard.hi > shard.lo:
        data = data.shard(num_shards=shard.hi, index=shard.lo, contiguous=True)
    try:
        with closing(iter(data)) as rows:
            for number, row in enumerate(rows, 1):
                if shard.limit is not None and number > shard.limit:
                    return
                yield Line(number, plain(row))
    except (OSError, ValueError) as error:
        raise hub_error(shard.place, error) from None


_READERS = {
    "lines": _lines,
    "gzip": _compressed,
    "zstd": _compressed,
    "json": _json,
    "parquet": _parquet,
    "sample": _sample,
    "hub": _hub,
}


def parse_line(line: bytes, number: int) -> Line:
    """One JSON value. orjson reads what it reads just like `json`, but for integers of more than 64 bits."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return _parse_slowly(line, number)
    if _has_large_number(value):
        return _parse_slowly(line, number)
    return Line(number, value, size=len(line))


def _has_large_number(value: Any) -> bool:
    """Whether a number may have been an integer that orjson could only take as a float."""
    stack = [value]
    while stack:
        one = stack.pop()
        kind = type(one)
        if kind is str:
            continue
        if kind is dict:
            stack += one.values()
        elif kind is list:
            stack += one
        elif kind is float and abs(one) >= _INT64:
            return True
    return False


def _parse_slowly(line: bytes, number: int) -> Line:
    """The standard library's reader, which says what is wrong and also takes half surrogate pairs."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Line(number, bad=BadRow("invalid_utf8", f"byte {error.start}: {error.reason}"))
    try:
        return Line(number, json.loads(text, parse_constant=_refuse), size=len(line))
    except RecursionError:
        return Line(number, bad=BadRow("invalid_json", "nested too deeply"))
    except ValueError as error:
        return Line(number, bad=BadRow("invalid_json", str(error)))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def plain(value: Any) -> Any:
    """JSON types only; dates and the like as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
