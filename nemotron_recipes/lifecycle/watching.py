"""Following a run until it has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from nemotron_recipes.executors import get_executor
from nemotron_recipes.executors.remote import sites, transport
from nemotron_recipes.lifecycle.reach import refresh
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import JobHandle, Outlook

POLL_SECONDS = 0.1  # between two looks at the run folder
ASK_SECONDS = 0.2  # between two questions, at first
COPY_SECONDS = 1.0
ALIVE = ("queued", "running")


def watch(handle: JobHandle, poll: Callable[[Outlook | None], None]) -> None:
    """Call `poll` with what the executor said last, until the run has ended, and once after.

    The executor is asked beside it, in a thread: a scheduler that does not answer must not hold up the log. It is asked
    at once when the run folder has news, else less and less often.
    """
    events, news = RunDir(Path(handle.run_dir)).events, 0
    asking, copying = _Asking(handle), _Copying(handle)
    asking.start()
    copying.start()
    try:
        while (outlook := asking.told()) is None or outlook.alive in ALIVE:
            poll(outlook)
            size = events.stat().st_size if events.exists() else 0
            if size != news:
                news = size
                asking.wake.set()
            asking.ended.wait(POLL_SECONDS)
    finally:
        asking.over = True
        asking.wake.set()
        copying.over.set()
    refresh(handle)
    poll(outlook)


class _Asking(threading.Thread):
    """Asks a run's executor again and again."""

    def __init__(self, handle: JobHandle):
        super().__init__(daemon=True)
        self.handle, self.executor = handle, get_executor(handle.executor)
        self.wake, self.ended, self.over = threading.Event(), threading.Event(), False
        self._outlook: Outlook | None = None
        self._error: BaseException | None = None

    def told(self) -> Outlook | None:
        """The newest answer; None before the first. Raises what asking has raised."""
        if self._error is not None:
            raise self._error
        return self._outlook

    def run(self) -> None:
        began = time.monotonic()
        while not self.over:
            self.wake.clear()
            try:
                with transport.through(sites.of_handle(self.handle)):
                    self._outlook = outlook = self.executor.look(self.handle)
            except BaseException as error:  # noqa: BLE001  raised again where the answer is waited for
                self._error = error
                break
            if outlook.alive not in ALIVE:
                break
            waited = time.monotonic() - began
            self.wake.wait(min(self.executor.ask_seconds, max(ASK_SECONDS, waited / 10)))
        self.ended.set()


class _Copying(threading.Thread):
    """Keeps the copy of a run's folder that is elsewhere; ends at once where it is read where it lies."""

    def __init__(self, handle: JobHandle):
        super().__init__(daemon=True)
        self.handle, self.over = handle, threading.Event()

    def run(self) -> None:
        while sites.of_handle(self.handle).name and not self.over.wait(COPY_SECONDS):
            refresh(self.handle)
