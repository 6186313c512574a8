"""Which files a version has, each with its digest: to name the one that is no longer what was registered.

    <root>/<name>/v3/files.json    sealed; files: relative name -> [bytes, digest]

The manifest's digest is computed from these, so a list that gives another one is not believed. It is a file of its own
since manifests are read by the thousand. Versions of earlier releases have none. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import Problem
from nemotron_recipes.fsio import digest_of, digests_below
from nemotron_recipes.rundir import Damaged, read_json, write_sealed

FILES = "files.json"


def write(content: Path, digests: Mapping[str, str]) -> None:
    """Beside the content of a version that has no name yet. digests: relative name -> digest."""
    files = {name: [(content / name).stat().st_size, digest] for name, digest in digests.items()}
    write_sealed(content.parent / FILES, {"files": files})


def problems(label: str, content: Path, recorded: str, pinned: str) -> Iterator[Problem]:
    """Reads all of a version's content: why it is not what has these digests; nothing where it is.

    recorded, pinned    at its registration; by whoever uses it
    """
    digests = digests_below(content) if content.is_dir() else None
    actual = digest_of(digests) if digests is not None else "missing"
    listed = _listed(content.parent / FILES, recorded)
    for expected, whose in ((recorded, "recorded at registration"), (pinned, "pinned")):
        if actual != expected:
            text = f"{label} has changed: its content is {actual}, {whose} was {expected}"
            fix = "restore that folder, or run its stage again with --force"
            if digests is None or not listed or expected != recorded:
                yield Problem(text, str(content), fix)
            else:
                name, why = _first(content, digests, listed)
                yield Problem(f"{text}; {name}: {why}", str(content / name), fix)
            break
    if listed is None:
        what = "but its content is whole" if actual == recorded else "so which file has changed isn't known"
        text = f"the list of the files of {label} is damaged, {what}"
        yield Problem(text, str(content.parent / FILES), "restore that file, or remove it: it only helps to name files")


def _listed(path: Path, recorded: str) -> dict[str, Any] | None:
    """Name -> [bytes, digest]; empty where there is no list, None where it isn't what was written."""
    try:
        files: dict[str, Any] = (read_json(path) or {"files": {}})["files"]
        fits = not files or digest_of({name: digest for name, (_, digest) in files.items()}) == recorded
    except (Damaged, KeyError, TypeError, ValueError, AttributeError):  # no JSON, or that of something else
        return None
    return files if fits else None


def _first(content: Path, digests: Mapping[str, str], listed: Mapping[str, Any]) -> tuple[str, str]:
    """The first file that is not as it was, and what became of it."""
    for name in sorted(digests.keys() | listed.keys()):
        if name not in digests:
            return name, "it is gone"
        if name not in listed:
            return name, "it was not there at registration"
        size, digest = listed[name]
        if digests[name] != digest:
            now = (content / name).stat().st_size
            return name, f"of its {size} bytes {now} are left" if now < size else "it isn't what was registered"
    raise AssertionError("the same files with the same digests have the same digest in all")
