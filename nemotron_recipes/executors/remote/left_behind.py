"""Secrets of a run that nobody runs any more, and whose end nobody could record."""

from __future__ import annotations

from pathlib import Path

from nemotron_recipes.rundir import RunDir, read_jsonl


def remove_secrets(run: RunDir, file: Path) -> None:
    """Unless they are newer than all that is known of the run: then somebody is just submitting it once more."""
    try:
        made = file.stat().st_mtime
    except FileNotFoundError:
        return
    last = max((event["time"] for event in read_jsonl(run.events)), default=0.0)
    if made <= last:
        file.unlink(missing_ok=True)
