"""Failures that come from a full disk are told from others."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nemotron_recipes.rundir import append_event, read_jsonl
from nemotron_recipes.worker import room


def wrapped(error: Exception) -> Exception:
    """As a library raises an error of its own while it handles one."""
    outer = ValueError("in a library")
    outer.__context__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
)
def test_no_room_is_recognised_through_what_wraps_it(tmp_path: Path, error: Exception) -> None:
    assert room.full_folder(wrapped(error), (tmp_path,)) == tmp_path
    assert "train.resume=true" in room.in_words(tmp_path, tmp_path / "iter_0000005")
    assert "train.resume" not in room.in_words(tmp_path, None)


def test_another_failure_is_not_the_disks(tmp_path: Path) -> None:
    for error in (OSError(errno.EACCES, "Permission denied"), RuntimeError("CUDA out of memory")):
        assert room.full_folder(error, (tmp_path, tmp_path / "absent")) is None
    assert list(tmp_path.iterdir()) == []


def test_an_event_never_joins_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_event(path, "first")
    with open(path, "a") as events:
        events.write('{"time": 1, "event": "cut sh')
    append_event(path, "second")
    append_event(path, "third")
    assert [event["event"] for event in read_jsonl(path)] == ["first", "second", "third"]
