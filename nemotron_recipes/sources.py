"""The package's source files: which of them travel with a run, their digest, and where a run keeps its copy.

Whoever starts a stage holds the copy against the plan, so this stands below planning. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

TRAVELS = {".py", ".typed", ".jinja", ".json", ".toml"}
DATA = ("conf", "containers")  # folders of the installed package that hold no code
LARGEST = 1_000_000  # bytes; no source file comes near, data that was left there does
SNAPSHOT = "code"  # folder in the run folder; it goes on the workers' PYTHONPATH
NAME = __name__.partition(".")[0]


def digest_of(package: Path) -> str:
    """Digest of the names and contents of a package's source files."""
    digest = hashlib.sha256()
    for path in sorted_out(package)[0]:
        name = path.relative_to(package).as_posix()
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return "sha256:" + digest.hexdigest()


def snapshot_of(run_dir: Path) -> Path:
    """The copy of the package in a run folder."""
    return run_dir / SNAPSHOT / NAME


def changed(run_dir: Path, planned: str) -> str:
    """Which copy is not the code that was planned any more; "" when it is, or where the run took none along."""
    copy = snapshot_of(run_dir)
    return str(copy) if copy.is_dir() and digest_of(copy) != planned else ""


def sorted_out(package: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """(files that travel, (name, why not) of those that don't), in a stable order; caches are not worth a word."""
    travel: list[Path] = []
    left: list[tuple[str, str]] = []
    for folder, folders, names in os.walk(package):
        data = DATA if folder == str(package) else ()
        folders[:] = sorted(f for f in folders if f != "__pycache__" and f not in data)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix not in TRAVELS:
                left.append((path.relative_to(package).as_posix(), "no source file"))
            elif path.stat().st_size > LARGEST:
                left.append((path.relative_to(package).as_posix(), f"larger than {LARGEST} bytes"))
            else:
                travel.append(path)
    return travel, left
