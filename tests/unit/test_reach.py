"""A store whose file system hangs: a command says so instead of hanging with it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from nemotron_recipes.cli import reach
from nemotron_recipes.errors import UserError


def test_a_folder_that_never_answers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reach.check(seconds=60)  # nothing is there yet, and that is an answer
    hangs, real = threading.Event(), os.listdir

    def listdir(folder: Path) -> list[str]:
        if str(folder).endswith("store"):
            hangs.wait()
        return real(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    try:
        with pytest.raises(UserError, match="nemotron-output/store did not answer for 0 s"):
            reach.check(seconds=0.2)
    finally:
        hangs.set()
