"""A limit on the time that one completion may take of a reward: some patterns take exponential time on some texts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SECONDS = 5.0


class TooLong(Exception):
    """The time is up."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise TooLong within the block when it takes longer than SECONDS; Python's regular expressions look for signals.

    In the main thread, where trainers compute rewards; elsewhere there is no limit.
    """
    seconds = SECONDS
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> Any:
        raise TooLong(f"a reward took longer than {seconds:g} s for one completion")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
