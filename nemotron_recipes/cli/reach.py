"""Whether the folders that every command reads answer at all: a network file system that hangs must not hang us."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError

LONGEST = 8.0  # seconds


def check(seconds: float = LONGEST) -> None:
    """UserError: the store or the folder of runs does not answer. Says nothing about folders that don't exist."""
    try:
        environment = read_environment()
    except UserError:
        return  # the command itself says what is wrong with env.toml
    silent = [folder for folder in (environment.output / "runs", environment.store) if not _answers(folder, seconds)]
    if silent:
        fix = "its file system hangs: look at the mount, or ask whoever runs it"
        raise UserError(*(Problem(f"{folder} did not answer for {seconds:.0f} s", fix=fix) for folder in silent))


def _answers(folder: Path, seconds: float) -> bool:
    """A thread that hangs in the kernel can't be stopped; as a daemon it ends with the process."""
    answered = threading.Event()

    def look() -> None:
        with suppress(OSError):  # an answer as well: the command says what it is
            os.listdir(folder)
        answered.set()

    threading.Thread(target=look, daemon=True).start()
    return answered.wait(seconds)
