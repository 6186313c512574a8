"""Faults at the n-th change of the file system, in a forked child: SIGKILL, EIO, ENOSPC, a short write."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

FAULTS = ("kill", "EIO", "ENOSPC", "short")
CHANGES = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir", "chmod")


class Injector:
    """From `arm` on, the `step`-th change of this process meets `fault`; `changes` counts them."""

    def __init__(self, step: int, fault: str):
        self.step = step
        self.fault = fault
        self.changes = 0

    def arm(self) -> None:
        for name in CHANGES:
            # A process that dies loses nothing that the kernel has: the disk, which is slow, is for the power cuts.
            setattr(os, name, self._wrapped(name, os.fstat if name == "fsync" else getattr(os, name)))
        real = os.fdopen
        os.fdopen = lambda *a, **k: _File(real(*a, **k), self)  # type: ignore[assignment]

    def due(self) -> bool:
        self.changes += 1
        return self.changes == self.step

    def fail(self) -> None:
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.EIO if self.fault == "EIO" else errno.ENOSPC
        raise OSError(number, os.strerror(number))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            reads = name == "open" and not (arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if reads or not self.due():
                return real(*arguments, **named)
            if name == "write" and self.fault == "short":
                return real(arguments[0], arguments[1][: len(arguments[1]) // 2])  # the kernel may do just this
            return self.fail()

        return call


class _File:
    """A file whose write may stop halfway: the part that fits is on the disk, then the error."""

    def __init__(self, handle: Any, injector: Injector):
        self._handle = handle
        self._injector = injector

    def write(self, data: bytes) -> int:
        if self._injector.due():
            if self._injector.fault in ("short", "kill"):
                self._handle.write(data[: len(data) // 2])
                self._handle.flush()
            self._injector.fail()
        return int(self._handle.write(data))

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def in_child(work: Callable[[], str], step: int, fault: str) -> tuple[str | None, int]:
    """(what `work` acknowledged, None when it didn't; how many changes it made). Raises when it broke otherwise."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        report, leave = os.write, os._exit
        injector = Injector(step, fault)
        try:
            injector.arm()
            said = "ok " + work()
        except OSError as error:
            said = f"error {error.errno}"
        except BaseException as error:  # noqa: BLE001  a child must not come back into pytest
            said = f"broken {error!r}"
        report(writer, f"{injector.changes} {said}".encode())
        leave(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    if not text:
        assert os.WIFSIGNALED(status), "it ended without a word"
        return None, step
    changes, _, said = text.partition(" ")
    assert not said.startswith("broken"), said
    return (said.removeprefix("ok ") if said.startswith("ok ") else None), int(changes)
