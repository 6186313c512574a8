"""The run folder: the one place where its layout is decided. Standard library only.

<output>/runs/<run id>/
    plan.json  rendered.json  handle.json
    code/  code.patch         the sources that the workers run; what git had not committed of them
    events.jsonl              what the launcher did: submitted, stage-started, stage-exited, cancelled, ...
    driver.log                what the launcher printed
    closed.json               digests of what stands in files without a seal, when the run had ended (closing.py)
    <stage>/
        files/                the exact files of the Plan (train.yaml, ...)
        events/attempt-1.rank-0.jsonl    append-only, one writer each
        logs/attempt-1/rank-0.log        stdout and stderr of each rank; launcher.log beside them
        heartbeats/attempt-1.rank-0.json where a rank is now; stacks/ its Python stacks, when somebody asked
        metrics.jsonl         one line per logged step, written by rank 0
        checkpoints/          iter_NNNNNNN folders, latest_checkpointed_iteration.txt; partial/: not whole;
                              .digests/: of those that trainers of other projects write (checkpoints.py)
        failures/attempt-1.rank-0.json   what ended a rank: time, rank, error, exit_code, lines
        environment/attempt-1.json       rank 0's host, hardware, packages, variables; names of secrets only
        record.json           written once by rank 0, last of all
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import digest_of_start, fsync_file, fsync_folder, write_atomic
from nemotron_recipes.seals import opened, opened_line, sealed, sealed_line

TORN = "torn"
COPIED = ".copied.json"  # in a run folder that is a copy of one on another machine: what of it is here
TRACKER = "latest_checkpointed_iteration.txt"
ATTEMPT_ENV = "NEMOTRON_ATTEMPT"
DEADLINE_ENV = "NEMOTRON_DEADLINE"  # seconds since the epoch: by then a worker must have saved and ended
STACKS_SIGNAL = "SIGUSR2"  # a worker that gets it writes the Python stacks of all its threads to its stacks file
RANKS_HERE_ENV = "NEMOTRON_RANKS_HERE"  # so many ranks, from 0 on, write into one run folder; unset: all
RUN_ID_ENV = "NEMOTRON_RUN_ID"  # in the environment of every process that an executor starts for a run


class Damaged(UserError, ValueError):
    """A file is not what was written to it; the message names it."""

    def __init__(self, path: Path, reason: str, line: int = 0, fix: str = "bring it back from a copy"):
        self.reason = reason
        where = f"{path}, line {line}" if line else str(path)
        super().__init__(Problem(f"{path.name} is damaged: {reason}", where, fix))


@dataclass(frozen=True)
class StageDir:
    """Paths of one stage of a run."""

    path: Path

    @property
    def files(self) -> Path:
        return self.path / "files"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """Loss and learning rate over steps, as a picture."""
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def record(self) -> Path:
        return self.path / "record.json"

    def events(self, attempt: int, rank: int) -> Path:
        return self.path / "events" / f"attempt-{attempt}.rank-{rank}.jsonl"

    def environment(self, attempt: int) -> Path:
        return self.path / "environment" / f"attempt-{attempt}.json"

    def failure(self, attempt: int, rank: int) -> Path:
        return self.path / "failures" / f"attempt-{attempt}.rank-{rank}.json"

    def first_failure(self, attempt: int) -> dict[str, Any] | None:
        """The failure file of the rank that failed first: mostly the cause, the others fell over it."""
        files = (self.path / "failures").glob(f"attempt-{attempt}.rank-*.json")
        found = [failure for path in files if (failure := read_json(path)) is not None]
        return min(found, key=lambda failure: failure["time"], default=None)

    def heartbeat(self, attempt: int, rank: int) -> Path:
        """Where that rank is (pulse.Beat); replaced again and again."""
        return self.path / "heartbeats" / f"attempt-{attempt}.rank-{rank}.json"

    def heartbeats(self, attempt: int) -> list[Path]:
        return [*(self.path / "heartbeats").glob(f"attempt-{attempt}.rank-*.json")]

    def stacks(self, attempt: int, rank: int) -> Path:
        """Python stacks of that rank, one dump after another; none where nobody asked."""
        return self.path / "stacks" / f"attempt-{attempt}.rank-{rank}.txt"

    def logs(self, attempt: int) -> Path:
        return self.path / "logs" / f"attempt-{attempt}"

    def log(self, attempt: int, rank: int) -> Path:
        return self.logs(attempt) / f"rank-{rank}.log"

    def launcher_log(self, attempt: int, node: int = 0) -> Path:
        """Of the processes of one node; the first node's is the one that readers know."""
        return self.logs(attempt) / ("launcher.log" if node == 0 else f"launcher.node-{node}.log")

    def job_logs(self) -> list[Path]:
        """What a scheduler's job printed around the stage: of its newest job alone."""
        found = sorted((self.path / "logs").glob("*.out"), key=lambda path: path.stat().st_mtime)
        newest = found[-1].stem.rpartition("-")[2] if found else ""
        return [path for path in found if path.stem.rpartition("-")[2] == newest]

    def ranks_with_logs(self, attempt: int) -> list[int]:
        """The ranks that have written a log in that attempt."""
        names = (path.stem.removeprefix("rank-") for path in self.logs(attempt).glob("rank-*.log"))
        return sorted(int(name) for name in names if name.isdecimal())

    def last_attempt(self) -> int:
        """The newest attempt that left a log folder; 0 when none did."""
        numbers = [int(p.name.removeprefix("attempt-")) for p in (self.path / "logs").glob("attempt-*")]
        return max(numbers, default=0)


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def rendered(self) -> Path:
        return self.path / "rendered.json"

    @property
    def handle(self) -> Path:
        return self.path / "handle.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def driver_log(self) -> Path:
        return self.path / "driver.log"

    def stage(self, name: str) -> StageDir:
        return StageDir(self.path / name)


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Append one JSON line: `time` (seconds since the epoch), `event`, the fields, and a seal. One write, then fsync.

    It never joins a line that a crash or a full disk has cut short, and says that it found one (`after`: "torn").
    OSError when it could not be written whole.
    """
    tree = {"time": round(time.time(), 3), "event": event, **fields}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        line = "\n" + sealed_line({**tree, "after": TORN}) if torn else sealed_line(tree)
        written = os.write(descriptor, line.encode())
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        fsync_folder(path.parent)


def read_jsonl(path: Path, strict: bool = False) -> Iterator[dict[str, Any]]:
    """Whole lines of a JSONL file; a last line cut short by a crash is left out. A missing file is empty.

    A line that is not what was written is left out. With `strict` it is named by raising Damaged, unless the next whole
    line forgives it: whoever wrote that found it torn, so nobody had been told that it was written; or that one has no
    seal, from a writer that says nothing about what it found.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as handle:
        bad = 0  # the first of the bad lines since the last whole one
        for number, line in enumerate(handle, 1):
            if not line.endswith("\n"):
                break
            try:
                tree, seal = opened_line(line)
            except ValueError:
                bad = bad or number
                continue
            if bad and strict and seal and tree.get("after") != TORN:
                break
            bad = 0
            yield tree
    if bad and strict:
        raise Damaged(path, "this line isn't what was written", bad)


def read_json(path: Path | str) -> dict[str, Any] | None:
    """A JSON object written by `write_atomic` or `write_sealed`, or None when the file is not there. Damaged: it is no
    JSON, or its seal does not fit."""
    try:
        with open(path, "rb", buffering=0) as handle:  # there may be 10,000 of them
            return opened(json.loads(handle.read()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Damaged(Path(path), str(error)) from None


def write_sealed(path: Path, tree: dict[str, Any], kind: str = "") -> None:
    """A JSON object with its seal, which `read_json` checks. kind: of document; the file's name says it otherwise."""
    whole = sealed(tree, kind or path.stem)
    write_atomic(path, json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=True) + "\n")


def write_record(stage: StageDir, record: dict[str, Any]) -> None:
    """The stage's last word. Keys: run, stage, attempt, fingerprint, state ("succeeded" | "failed" | "cancelled"),
    exit_code, started, ended (seconds since the epoch), parents (list of {input, <fields of the exact Artifact>}),
    outputs (slot -> {name, version, digest, uri}), results (name -> number; null: not finite), error (text or None),
    rank (of the failure or None), host, world_size, python, versions (library -> version). `files` is added: what
    metrics.jsonl is now."""
    measured = [stage.metrics] if stage.metrics.exists() else []
    for path in measured:
        fsync_file(path)  # or a power cut would leave a digest of what is not there
    files = {path.name: mark(path) for path in measured}
    write_sealed(stage.record, {**record, "files": files})


def mark(path: Path, limit: float = float("inf"), each: Callable[[], None] = lambda: None) -> list[Any]:
    """What a file holds now, for `check_mark`: [bytes, their digest]; of more than `limit` bytes no digest ("").

    each  called between pieces; what it raises ends the reading
    """
    size = path.stat().st_size
    return [size, digest_of_start(path, size, each) if size <= limit else ""]


def check_mark(path: Path, marked: list[Any], exactly: bool = False) -> None:
    """Damaged: the file does not begin with what was marked. What was added since counts with `exactly` alone."""
    size, digest = marked
    try:
        now = path.stat().st_size
        changed = digest and now >= size and digest_of_start(path, size) != digest
    except FileNotFoundError:
        raise Damaged(path, "it is gone") from None
    if now < size:
        raise Damaged(path, f"of its {size} bytes {now} are left")
    if exactly and now > size:
        raise Damaged(path, f"it has {now} bytes, and had {size}")
    if changed:
        raise Damaged(path, "it isn't what was written")


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint that the tracker file names, when its folder is there; the tracker is the commit."""
    try:
        step = int((root / TRACKER).read_text().strip())
    except (FileNotFoundError, ValueError):
        return None
    folder = root / f"iter_{step:07d}"
    return folder if folder.is_dir() else None
