"""Who tells W&B of a run: one process at a time, on whatever host, also where file locks don't reach.

    <run>/mirror/lease-N    the process that tells; it touches the file while it lives, and removes it at its end

A number is made by one process alone (O_EXCL). A lease is over when its process is known to be gone, or, of another
host or container, when the file was not touched for STALE_SECONDS by the file system's own clock: then N+1 may be made.
Whoever finds that its lease was taken over, since it was suspended or cut off, ends at once.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.owner import fate, this_process

RENEW_SECONDS = 10.0
STALE_SECONDS = 120.0  # longer than a network file system may show an old time
POLL_SECONDS = 0.5


class Lease:
    """The right to tell W&B of the run whose `mirror` folder this is."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.number = 0
        self.over = threading.Event()

    def take(self, seconds: float) -> bool:
        """Wait for so long at most; whether this process has it now."""
        until = time.monotonic() + seconds
        while not self._try():
            if time.monotonic() >= until:
                return False
            time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))
        return True

    def keep(self, lost: Callable[[], None]) -> None:
        """Touch it from now on, in a thread; `lost` is called when another process has taken it over."""
        threading.Thread(target=self._renew, args=(lost,), daemon=True).start()

    def release(self) -> None:
        self.over.set()
        self._path(self.number).unlink(missing_ok=True)

    def _try(self) -> bool:
        found = self._numbers()
        if any(not self._is_over(number) for number in found):
            return False
        self.number = max(found, default=0) + 1
        path = self._path(self.number)
        try:
            with open(path, "x", encoding="utf-8") as out:
                json.dump(this_process(), out)
        except FileExistsError:
            return False
        # Another process may have removed what was over, and have begun anew below this number.
        if any(not self._is_over(number) for number in self._numbers() if number != self.number):
            path.unlink(missing_ok=True)
            return False
        for number in found:
            self._path(number).unlink(missing_ok=True)
        return True

    def _renew(self, lost: Callable[[], None]) -> None:
        path = self._path(self.number)
        while not self.over.wait(RENEW_SECONDS):
            try:
                os.utime(path)
                if max(self._numbers(), default=0) == self.number:
                    continue
            except FileNotFoundError:
                pass
            except OSError:  # the file system is away: whoever sees it better takes over
                continue
            if not self.over.is_set():
                lost()
            return

    def _is_over(self, number: int) -> bool:
        try:
            with open(self._path(number), encoding="utf-8") as held:  # opened: then its time is no remembered one
                owner, touched = _owner(held.read()), os.fstat(held.fileno()).st_mtime
        except FileNotFoundError:
            return True
        known = fate(owner)
        return known == "gone" or (known == "unknown" and self._now() - touched > STALE_SECONDS)

    def _now(self) -> float:
        probe = self.folder / f".clock-{uuid.uuid4().hex}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _numbers(self) -> list[int]:
        names = (path.name.partition("-") for path in self.folder.glob("lease-*"))
        return sorted(int(number) for _, _, number in names if number.isdigit())

    def _path(self, number: int) -> Path:
        return self.folder / f"lease-{number}"


def _owner(text: str) -> dict[str, Any]:
    """{}: it was cut off; then nothing is known of the process."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
