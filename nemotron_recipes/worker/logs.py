"""Where a rank's output goes: its log file, and for a person who started it by hand also the terminal."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path


class RankLog:
    """stdout and stderr of this process (and of its children) appended to `path`, from `open` to `close`.

    The file descriptors themselves are redirected, so that output of C libraries and crashes arrives too. With `show`
    a thread copies what the file gains to the original stdout: the log stays whole whatever becomes of this process.
    """

    def __init__(self, path: Path, show: bool):
        self.path = path
        self._show = show
        self._stop = threading.Event()

    def open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _flush()
        self._outside = (os.dup(1), os.dup(2))
        log = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        start = os.fstat(log).st_size
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        for stream in (sys.stdout, sys.stderr):
            assert isinstance(stream, TextIOWrapper)
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
        faulthandler.enable()  # a segmentation fault leaves the Python stack in the log
        self._follower = threading.Thread(target=self._follow, args=(start,), daemon=True)
        if self._show:
            self._follower.start()

    def say_outside(self, text: str) -> None:
        """A line on the original stderr: the launcher's log, or the terminal."""
        if not self._show:  # the terminal has it from the log
            with suppress(OSError):  # the launcher may be gone already; the record must be written all the same
                os.write(self._outside[1], (text + "\n").encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Give the original stdout and stderr back."""
        _flush()
        self._stop.set()
        if self._show:
            self._follower.join()
        os.dup2(self._outside[0], 1)
        os.dup2(self._outside[1], 2)
        for descriptor in self._outside:
            os.close(descriptor)

    def _follow(self, start: int) -> None:
        with open(self.path, "rb") as log:
            log.seek(start)
            while True:
                last = self._stop.wait(0.1)
                while piece := log.read(1 << 16):
                    try:
                        os.write(self._outside[0], piece)
                    except OSError:
                        return  # nobody watches any more; the log has it all
                if last:
                    return


def _flush() -> None:
    with suppress(OSError):  # a full disk; the end of this process must not change over it
        sys.stdout.flush()
        sys.stderr.flush()
