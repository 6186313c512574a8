"""Where rows come from: JSON Lines files, sample tasks, the hub. Every row keeps its file and line."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.settings import Source
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import files_below

_OTHER_FORMATS = (".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst", ".xz", ".bz2", ".zip")


@dataclass(frozen=True)
class Line:
    """One row as read. `file` is relative to the source, so that it doesn't depend on where the data lie; `path` is
    what a person opens. `bad` is set instead of `value` where the line is no JSON."""

    file: str
    path: str
    number: int  # from 1
    value: Any = None
    bad: BadRow | None = None


@dataclass(frozen=True)
class Hub:
    """A data set on the hub at one commit."""

    name: str
    revision: str | None


def find_files(location: Path) -> list[tuple[str, Path]]:
    """(relative name, path) of the files that a path, a folder or a glob means, sorted. UserError: none."""
    if location.is_dir():
        paths = [path for path in files_below(location) if path.suffix in (".jsonl", ".ndjson")]
        root = location
    else:
        matches = [str(location)] if location.exists() else glob.glob(str(location), recursive=True)
        paths = sorted(Path(match) for match in matches if os.path.isfile(match))
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else location.parent
    if not paths:
        raise UserError(Problem(f"no rows at {location}", fix="give a .jsonl file, a folder with some, or a glob"))
    for path in paths:
        if path.suffix in _OTHER_FORMATS:
            raise UserError(Problem(f"{path} is not JSON Lines", fix="convert it to one JSON object per line"))
    return [(path.relative_to(root).as_posix(), path) for path in paths]


def read_files(files: list[tuple[str, Path]], limit: int | None) -> Iterator[Line]:
    """Rows of JSON Lines files. Blank lines are no rows. Only a newline byte ends a line."""
    count = 0
    for name, path in files:
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                if limit is not None and count >= limit:
                    return
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                count += 1
                yield _parse(line, name, str(path), number)


def read_sample(source: Source, method: str, limit: int) -> Iterator[Line]:
    """Generated rows of `sample:TASK`; without a split they come from the task's training problems."""
    from nemotron_recipes.tiny.tasks import rows

    task = source.path.removeprefix("sample:")
    for number, row in enumerate(rows(task, method, source.split or "train", limit, source.seed), 1):
        yield Line(source.path, source.path, number, row)


def read_hub(hub: Hub, source: Source, limit: int | None) -> Iterator[Line]:
    """Rows of a hub data set, streamed. UserError: `datasets` is missing, or the hub doesn't give the data."""
    try:
        from datasets import load_dataset
    except ImportError:
        what = f"{source.path}: reading from the hub needs the 'datasets' library"
        raise UserError(Problem(what, fix="pip install 'nemotron-recipes[data]'")) from None
    label = f"hf://{hub.name}/{source.hub_split}"
    try:
        data = load_dataset(hub.name, source.subset, split=source.hub_split, revision=hub.revision, streaming=True)
        for number, row in enumerate(data, 1):
            if limit is not None and number > limit:
                return
            yield Line(label, label, number, _plain(row))
    except (OSError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(Problem(f"{label}: {lines[0]}", fix="check name, subset, hub_split and the network")) from None


def _parse(line: bytes, name: str, path: str, number: int) -> Line:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Line(name, path, number, bad=BadRow("invalid_utf8", f"byte {error.start}: {error.reason}"))
    try:
        return Line(name, path, number, json.loads(text, parse_constant=_refuse))
    except RecursionError:
        return Line(name, path, number, bad=BadRow("invalid_json", "nested too deeply"))
    except ValueError as error:
        return Line(name, path, number, bad=BadRow("invalid_json", str(error)))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _plain(value: Any) -> Any:
    """JSON types only; dates and the like as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
