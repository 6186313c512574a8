"""The user's names for versions: <store>/NAME/.aliases/ALIAS holds `vN` and a checksum."""

from __future__ import annotations

import re
from pathlib import Path

from nemotron_recipes.fsio import fsync_folder, write_atomic
from nemotron_recipes.rundir import Damaged
from nemotron_recipes.spec import sha256_text


def write(home: Path, alias: str, version: int) -> None:
    """Readers see the old meaning or the new one. home: the folder of the artifact's name."""
    write_atomic(home / ".aliases" / alias, _line(home.name, alias, version))
    fsync_folder(home)


def read(home: Path, alias: str) -> int:
    """Damaged: it can't be read."""
    path = home / ".aliases" / alias
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.fullmatch(r"v([1-9][0-9]*)( [0-9a-f]{12})?\n", text)  # without its end: from before there was one
    if not found or (found[2] and text != _line(home.name, alias, int(found[1]))):
        fix = "name it once more with nemotron artifacts alias"
        raise Damaged(path, f"nobody knows what {home.name}:{alias} is", fix=fix)
    return int(found[1])


def remove(home: Path, alias: str) -> None:
    """It is gone when this returns, also after a power cut."""
    (home / ".aliases" / alias).unlink(missing_ok=True)
    fsync_folder(home / ".aliases")


def _line(name: str, alias: str, version: int) -> str:
    """Its end stands for the rest: a changed digit would silently name another version."""
    check = sha256_text(f"{name}:{alias}=v{version}").removeprefix("sha256:")[:12]
    return f"v{version} {check}\n"
