"""Whether the folders that every command reads answer at all: a network file system that hangs must not hang us."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError

LONGEST = 8.0  # seconds


def check(seconds: float = LONGEST) -> None:
    """UserError: the store or the folder of runs does not answer. Says nothing about folders that don't exist."""
    try:
        environment = read_environment()
    except UserError:
        return  # the command itself says what is wrong with env.toml
    folders = (environment.output / "runs", environment.store)
    asked = [(folder, _Look(folder)) for folder in folders]
    until = time.monotonic() + seconds
    silent = [folder for folder, look in asked if not look.answered(until)]
    if silent:
        fix = "its file system hangs: look at the mount, or ask whoever runs it"
        raise UserError(*(Problem(f"{folder} did not answer for {seconds:.0f} s", fix=fix) for folder in silent))


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
