"""The folder of spools: one run at a time prepares the same thing, and what nobody has used for long goes away."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from nemotron_recipes.data.spool import remove_spool

UNUSED = 14 * 24 * 3600  # seconds after which a spool is removed
UNFINISHED = 24 * 3600  # seconds without a change after which a half-written spool is somebody's remains


class Spools:
    """A context in which this process alone prepares `inputs` (a text that names them) as `keys` (one per source) say;
    `say` hears of waiting."""

    def __init__(self, folder: Path, keys: Sequence[str], inputs: str, say: Callable[[str], None]):
        self.folder = folder
        self._keys = keys
        self._inputs = inputs
        self._say = say
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Spools:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(self._keys) + self._inputs
        name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._lock = (self.folder / f"{name}.lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._say(
                "another run prepares the same data in the same way: waiting for it, to take over what it has done"
            )
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:  # spools are whole or absent without a lock too; only work may be done twice
            self._say(f"{self.folder} knows no locks ({error.strerror}): going on without")
        os.utime(self._lock.name)
        self._clean()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._lock is not None
        self._lock.close()

    def key(self, source: int) -> str:
        return self._keys[source]

    def _clean(self) -> None:
        now = time.time()
        for entry in os.scandir(self.folder):
            try:
                unfinished = entry.is_dir() and entry.name.startswith(".")
                # Who writes a file leaves its folder's time as it is.
                changed = [entry.stat().st_mtime, *(inner.stat().st_mtime for inner in _inside(entry, unfinished))]
                age = now - max(changed)
            except FileNotFoundError:
                continue
            if entry.name.endswith(".lock") and age > UNUSED:  # whoever waits for it just now goes on unlocked
                with suppress(FileNotFoundError):
                    os.unlink(entry.path)
            elif entry.is_dir() and age > (UNFINISHED if unfinished else UNUSED):
                remove_spool(Path(entry.path))


def _inside(entry: os.DirEntry[str], wanted: bool) -> Iterator[os.DirEntry[str]]:
    return os.scandir(entry.path) if wanted else iter(())
