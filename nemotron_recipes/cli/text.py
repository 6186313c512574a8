"""Text for people: safe on a terminal, short where it can be."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import click

from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.fsio import write_atomic


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Left-aligned columns under a header; the last column is as long as it likes."""
    cells = [list(header), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for people: `512 B`, `2.5 MB`."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def write_page(path: Path, content: str | bytes, say: bool = True) -> None:
    """Write a page, report or picture, and say where. UserError: the file can't be written."""
    try:
        write_atomic(path, content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(Problem(f"{path} can't be written: {error.strerror}")) from None
    if say:
        click.echo(f"written: {path}")


def short(digest: str, length: int = 12) -> str:
    """The start of a `sha256:` digest."""
    return digest.removeprefix("sha256:")[:length]


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07`, `1:02:03`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def clock(moment: float) -> str:
    """`14:05:10`, with the date where it is not today's; `moment` is in seconds since the epoch."""
    then = datetime.fromtimestamp(moment)
    return then.strftime("%H:%M:%S" if then.date() == datetime.now().date() else "%Y-%m-%d %H:%M")


def age(created: str) -> str:
    """How long ago an ISO 8601 time was: `just now`, `5 min ago`, `3 h ago`, then the date."""
    try:
        return ago(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return "?"


def ago(moment: float) -> str:
    """The same; `moment` is in seconds since the epoch."""
    seconds = time.time() - moment
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h ago"
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d %H:%M")
