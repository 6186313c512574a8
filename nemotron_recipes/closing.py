"""The files of a run that grow, or are written once, and have no seal of their own: what stood in them at its end.

    <run>/closed.json    sealed; files: relative name -> [bytes, digest of so many bytes from the start]

Whoever records the end of a run writes it. Such files are only added to, so what stood there must stay there; what
comes later (the next attempt, a scheduler's last words) is not looked at. metrics.jsonl may be written anew by the next
attempt: the stage's record says what it was. A run without these has not ended, or nobody could record its end, or it
is of an earlier version: its files are taken as they are. So is the copy of a folder on another machine, which may be
behind. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemotron_recipes.fsio import fsync_all
from nemotron_recipes.rundir import (
    COPIED,
    Damaged,
    RunDir,
    StageDir,
    append_event,
    check_mark,
    mark,
    read_json,
    read_jsonl,
    write_sealed,
)

CLOSED = "closed.json"
FOLDERS = ("logs", "events", "failures", "environment", "stacks")  # of a stage
FILES = ("events.jsonl", "driver.log", "code.patch", "mirror/journal.jsonl", "mirror/done.jsonl")  # of a run
KINDS = (".log", ".out", ".err", ".txt", ".json", ".jsonl")  # others there come and go
MOST = 1 << 29  # bytes to be read at an end, which may not take minutes; of what is more, the length is noted
DEEP = 5  # folders from a file up to its run's


def end(run: RunDir, event: str, **fields: Any) -> None:
    """Append the launcher's last event, `finished` or `cancelled`, and close the run."""
    append_event(run.events, event, **fields)
    close(run)


def close(run: RunDir) -> None:
    """Note what stands in its files now. Whatever goes wrong: the end of a run does not depend on it."""
    with suppress(OSError):
        left = MOST
        files: dict[str, list[Any]] = {}
        found = _files(run)
        folders = {folder for path in found for folder in path.parents if run.path in folder.parents}
        fsync_all([*found, *folders])  # or a power cut would leave digests of what is not there
        for path in found:
            files[path.relative_to(run.path).as_posix()] = marked = mark(path, left)
            left -= marked[0] if marked[1] else 0
        write_sealed(run.path / CLOSED, {"files": files}, kind="closed")


def check(path: Path, known: Mapping[Path, list[Any]] | None = None) -> None:
    """Before a file of a run is believed. Damaged: it is not what it was when its run, or its stage, ended.

    known  what `marks` said of the run, where many of its files are looked at
    """
    if known is not None:
        found = known.get(path)
    elif path.name == StageDir(path.parent).metrics.name:
        found = _of_record(StageDir(path.parent))
    else:
        found = _of_run(path)
    if found is not None:
        check_mark(path, found)


def marks(run: Path) -> dict[Path, list[Any]]:
    """What stood in the files of a run when it ended; nothing where it has not, or this is a copy of its folder."""
    return {} if (run / COPIED).exists() else {run / name: marked for name, marked in _closed(run).items()}


def metrics(stage: StageDir) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; none where there are none. Damaged."""
    check(stage.metrics)
    return list(read_jsonl(stage.metrics))


def changed(run: RunDir) -> Iterator[Damaged]:
    """Everything that is not as it was."""
    known = {run.path / name: marked for name, marked in _closed(run.path).items()}
    for record in sorted(run.path.glob("*/record.json")):
        stage = StageDir(record.parent)
        with suppress(Damaged):  # the record itself, whose own reader says so
            known |= {stage.metrics: found} if (found := _of_record(stage)) else {}
    for path, marked in known.items():
        try:
            check_mark(path, marked)
        except Damaged as error:
            yield error


def _files(run: RunDir) -> list[Path]:
    """The short ones first."""
    places = [folder for name in FOLDERS for folder in run.path.glob(f"*/{name}")]
    there = (path for place in places for path in place.rglob("*") if path.suffix in KINDS)
    found = {path for path in there if path.is_file() and not path.is_symlink()}
    found |= {path for name in FILES if (path := run.path / name).is_file()}
    return sorted(found, key=lambda path: (path.stat().st_size, path))


def _of_run(path: Path) -> list[Any] | None:
    for folder in path.parents[:DEEP]:
        if known := _closed(folder):
            return None if (folder / COPIED).exists() else known.get(path.relative_to(folder).as_posix())
    return None


def _closed(run: Path) -> dict[str, list[Any]]:
    files: dict[str, list[Any]] = (read_json(run / CLOSED) or {"files": {}})["files"]
    return files


def _of_record(stage: StageDir) -> list[Any] | None:
    """Only the newest attempt's own record knows."""
    record = read_json(stage.record)
    if record is None or record["attempt"] < stage.last_attempt() or (stage.path.parent / COPIED).exists():
        return None
    found: list[Any] | None = record.get("files", {}).get(stage.metrics.name)
    return found
