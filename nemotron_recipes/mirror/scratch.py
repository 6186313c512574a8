"""Folders for the W&B SDK's temporary files: they go with the process, and, after a kill, with the next one here."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotron_recipes.artifacts.owner import fate, this_process

PREFIX = "nemotron-wandb-"
OWNER = "owner.json"
NAMELESS_SECONDS = 3600.0  # the owner's name follows at once


@contextmanager
def scratch() -> Iterator[str]:
    """A new folder, for as long as this is held."""
    sweep()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
        (Path(folder) / OWNER).write_text(json.dumps(this_process()), encoding="utf-8")
        yield folder


def sweep() -> None:
    """Remove what killed processes left on this machine. Of who is not known to be gone nothing is touched."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it begins just now, or what removed it was killed
            owner = {} if _age(folder) > NAMELESS_SECONDS else None
        if owner == {} or (isinstance(owner, dict) and fate(owner) == "gone"):
            shutil.rmtree(folder, ignore_errors=True)


def _age(folder: Path) -> float:
    """Seconds since something in it came or went; 0: it is gone."""
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:
        return 0.0
