"""Whether the folders that every command reads answer: a network file system that hangs must not hang us.

`check` asks before a command begins. `guard` goes on asking while it works: what hangs in the kernel can neither be
interrupted nor ended, so the work is done by a second process, and the first one leaves it behind.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError, printable

LONGEST = 8.0  # seconds
PAUSE = 1.0  # seconds between two looks while a command works
GOES_ON = "    a run that was started goes on as far as it can: see `nemotron runs list` once the folder answers\n"
PR_SET_PDEATHSIG = 1  # prctl(2)


def check(seconds: float = LONGEST) -> None:
    """UserError: the store or the folder of runs does not answer. Says nothing about folders that don't exist."""
    asked = [(folder, _Look(folder)) for folder in _folders()]
    until = time.monotonic() + seconds
    silent = [folder for folder, look in asked if not look.answered(until)]
    if silent:
        raise _silence(silent, seconds)


def guard(seconds: float = LONGEST, acts: bool = False) -> None:
    """Return in a second process, which does the work, and watch over it in this one, which then ends as that one does.
    Should that one become another program (a shell beside a stage), nothing is watched any more: it is the user's.

    When a folder falls silent it ends with exit code 2 and a message, whatever becomes of the second process. On Linux;
    elsewhere there is no second process.

    acts   the command may start, follow or stop a run. There is a second process only where a folder is on another
           machine, since whoever watches may not be killed alone: the second one dies with it. A disk of this machine
           is slow at most.
    """
    folders = _folders()
    if acts:
        from nemotron_recipes.executors.folders import may_fall_silent

        folders = [folder for folder in folders if may_fall_silent(folder)]
    if not (folders and _can_wait_for_processes()):
        return
    relays, works = _relays(), os.pipe()  # the other program will not have its end
    first, pid = os.getpid(), os.fork()
    if pid == 0:
        os.close(works[0])
        if acts:
            _die_with(first)
        for relay in relays:
            for stream in relay.streams:
                os.dup2(relay.writer, stream)
            os.close(relay.writer)
            os.close(relay.reader)
        return
    os.close(works[1])
    os._exit(_Guard(pid, relays, works[0], folders, seconds, GOES_ON if acts else "").watch())


def _die_with(parent: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before
        os._exit(2)


def _can_wait_for_processes() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # another system, an old kernel, a sandbox
        return False
    return True


def _folders() -> list[Path]:
    try:
        environment = read_environment()
    except (UserError, FileNotFoundError):
        return []  # the command itself says what is wrong with env.toml, or with the current folder
    return [environment.output / "runs", environment.store]


def _silence(silent: Iterable[Path], seconds: float) -> UserError:
    fix = "its file system hangs: look at the mount, or ask whoever runs it"
    return UserError(*(Problem(f"{folder} did not answer for {seconds:.0f} s", fix=fix) for folder in silent))


@dataclass
class _Relay:
    """A pipe into which the second process writes instead of into `streams`, which all are the same pipe: whoever reads
    there must see its end also when that process can't be ended."""

    streams: tuple[int, ...]
    reader: int
    writer: int


def _relays() -> list[_Relay]:
    """Of standard output and standard error, where they are pipes; one where both are the same, to keep the order."""
    same: dict[tuple[int, int], list[int]] = {}
    for stream in (1, 2):
        with suppress(OSError):
            status = os.fstat(stream)
            if stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode):
                same.setdefault((status.st_dev, status.st_ino), []).append(stream)
    return [_Relay(tuple(streams), *os.pipe()) for streams in same.values()]


class _Guard:
    """The first process."""

    def __init__(self, pid: int, relays: list[_Relay], works: int, folders: list[Path], seconds: float, remark: str):
        self.pid, self.works, self.folders, self.seconds, self.remark = pid, works, folders, seconds, remark
        self.looks: dict[int, tuple[Path, _Look, float]] = {}  # by the descriptor that becomes readable
        self.next_look = time.monotonic() + PAUSE
        self.selector = selectors.DefaultSelector()
        self.end = os.pidfd_open(pid)
        self.selector.register(self.end, selectors.EVENT_READ)
        self.selector.register(works, selectors.EVENT_READ)
        for relay in relays:
            os.close(relay.writer)
            os.set_blocking(relay.reader, False)
            self.selector.register(relay.reader, selectors.EVENT_READ, relay)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda number, _: os.kill(pid, number))
        signal.signal(signal.SIGINT, self._interrupt)

    def watch(self) -> int:
        """The exit code: the second process's own, 2 when a folder has fallen silent."""
        while True:
            silent = self._ask()
            if silent:
                os.kill(self.pid, signal.SIGKILL)  # where that helps
                for _, look, _ in self.looks.values():
                    look.answered(0.0)
                self._pass_on()
                text = "".join(f"error: {printable(str(p))}\n" for p in _silence(silent, self.seconds).problems)
                with suppress(OSError):
                    os.write(2, (text + self.remark).encode())
                return 2
            for key, _ in self._news():
                if key.fd == self.end:
                    return self._ended()
                if key.data is not None:
                    self._relay(key.data)
                elif key.fd == self.works:
                    self._leave()
                elif key.fd in self.looks:
                    self._answered(key.fd)

    def _answered(self, reader: int) -> None:
        _, look, _ = self.looks.pop(reader)
        self.selector.unregister(reader)
        look.answered(0.0)
        self.next_look = time.monotonic() + PAUSE

    def _leave(self) -> None:
        """The second process has ended, or is another program now."""
        self.selector.unregister(self.works)
        self.folders = []
        for reader in [*self.looks]:
            self._answered(reader)

    def _ask(self) -> list[Path]:
        """Look at the folders when it is time; those that did not answer."""
        now = time.monotonic()
        silent = [folder for folder, _, until in self.looks.values() if now >= until]
        if not self.looks and now >= self.next_look:
            self.next_look = now + PAUSE
            for folder in self.folders:
                look = _Look(folder)
                self.looks[look.reader] = folder, look, now + self.seconds
                self.selector.register(look.reader, selectors.EVENT_READ)
        return silent

    def _news(self) -> list[tuple[selectors.SelectorKey, int]]:
        """What there is to read, after a while at most. Who was stopped meanwhile (Ctrl-Z) waits so much longer."""
        patience, began = self._patience(), time.monotonic()
        found = self.selector.select(patience)
        stopped = time.monotonic() - began - patience
        if stopped > PAUSE:
            self.looks = {fd: (folder, look, until + stopped) for fd, (folder, look, until) in self.looks.items()}
        return found

    def _patience(self) -> float:
        """Seconds until something has to be done."""
        due = [until for _, _, until in self.looks.values()] or [self.next_look]
        return max(0.0, min(due) - time.monotonic())

    def _relay(self, relay: _Relay) -> None:
        """What has been written; when nobody reads it any more, its writer shall know that too."""
        goes_on = False
        with suppress(OSError):
            goes_on = _copied(relay)
        if not goes_on:
            self.selector.unregister(relay.reader)
            os.close(relay.reader)

    def _pass_on(self) -> None:
        """What the second process wrote last."""
        relays = [key.data for key in self.selector.get_map().values() if isinstance(key.data, _Relay)]
        for relay in relays:
            with suppress(OSError):
                while _copied(relay):
                    pass

    def _ended(self) -> int:
        self._pass_on()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if code < 0:  # whoever asks how this process ended hears the same
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        return code

    def _interrupt(self, number: int, frame: object) -> None:
        """A terminal sends Ctrl-C to the second process by itself."""
        try:
            from_terminal = os.tcgetpgrp(0) == os.getpgrp()
        except OSError:
            from_terminal = False
        if not from_terminal:
            os.kill(self.pid, number)


def _copied(relay: _Relay) -> bool:
    """Pass on what is there; False at its end. BlockingIOError: nothing is there now; OSError: nobody reads."""
    data = found = os.read(relay.reader, 1 << 16)
    while data:
        try:
            data = data[os.write(relay.streams[0], data) :]
        except BlockingIOError:  # whoever made the pipe wants it so
            select.select([], [relay.streams[0]], [])
    return bool(found)


class _Look:
    """A process that looks at a folder. What hangs in the kernel may neither be stopped nor let its process end: a
    thread would keep this command from ending, a process is left behind."""

    def __init__(self, folder: Path):
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _look(folder, writer)
        os.close(writer)

    def answered(self, until: float) -> bool:
        ready, _, _ = select.select([self.reader], [], [], max(0.0, until - time.monotonic()))
        os.close(self.reader)
        if ready:
            os.waitpid(self.pid, 0)
        else:
            os.kill(self.pid, signal.SIGKILL)  # where that helps
        return bool(ready)


def _look(folder: Path, report: int) -> NoReturn:
    """Ends this process. Nothing that somebody may wait for stays open in it."""
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        with suppress(OSError):  # an answer as well: the command says what it is
            os.listdir(folder)
            first = next((Path(place, files[0]) for place, _, files in os.walk(folder) if files), None)
            if first is not None:  # a client may list a folder out of its cache, but asks to open a file
                with open(first, "rb") as handle:
                    handle.read(1)
        os.write(report, b".")
    finally:
        os._exit(0)
