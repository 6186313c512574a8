"""Where a cluster's commands run and its files lie: on this machine, or on one that is reached over SSH.

Whoever speaks to a cluster calls `call(function, ...)`: the function, one of those that `agent.py` may be sent, runs
where the cluster is. Which machine that is, is decided once by `through`; nothing above knows.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from nemotron_recipes.errors import NemotronError


class Unreachable(NemotronError):
    """The machine, or the scheduler there, can't be asked now. What was asked of it may have been done, or not."""

    def __init__(self, message: str, fix: str = ""):
        super().__init__(message)
        self.fix = fix


class Transport(Protocol):
    """A machine, with the folder there of the run that is spoken of."""

    name: str  # "" for this machine
    native: dict[str, Any]  # what a run's handle needs to know to find it again

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` there. Unreachable; or what the function raises (OSError, UserError)."""
        ...

    def refresh(self) -> None:
        """Bring here what has changed of the run's folder there. Unreachable."""
        ...

    def near(self, path: str | Path) -> Path:
        """Where a path of that machine lies on this one, as far as it is kept here."""
        ...

    def far(self, path: str | Path) -> str:
        """The inverse of `near`: what a path of this machine is called there."""
        ...

    def at_terminal(self, argv: list[str]) -> list[str]:
        """argv that runs a command there with this terminal."""
        ...

    def start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        """Run a command there as a child of this process that reads nothing, says nothing on stderr, and can't outlive
        its connection there; its stdout is a pipe."""
        ...


class Here:
    """This machine: whatever runs commands for the cluster runs them here."""

    name = ""

    def __init__(self) -> None:
        self.native: dict[str, Any] = {}

    def refresh(self) -> None:
        """The run's folder is read where it lies."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Just that."""
        return function(*args)

    def near(self, path: str | Path) -> Path:
        """The same path."""
        return Path(path)

    def far(self, path: str | Path) -> str:
        """The same path."""
        return str(path)

    def at_terminal(self, argv: list[str]) -> list[str]:
        """The same argv."""
        return argv

    def start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        """A child."""
        silent = subprocess.DEVNULL
        return subprocess.Popen(argv, stdin=silent, stdout=subprocess.PIPE, stderr=silent)


HERE = Here()

_current: ContextVar[Transport] = ContextVar("transport", default=HERE)


def current() -> Transport:
    """The machine that is spoken to."""
    return _current.get()


def call(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` on the machine that is spoken to; a path below a run's folder here means the one there."""
    where = current()
    return where.call(function, *(where.far(arg) if isinstance(arg, Path) else arg for arg in args))


@contextmanager
def through(transport: Transport) -> Iterator[None]:
    """Speak to another machine within this block, in this thread."""
    token = _current.set(transport)
    try:
        yield
    finally:
        _current.reset(token)
