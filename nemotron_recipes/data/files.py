"""Files to read, here or in object storage (fsspec), and which format each is in."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nemotron_recipes.data.remote import is_remote, listed, look, open_remote
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import file_digest, files_below
from nemotron_recipes.spec import sha256_text, to_json

# Suffix -> how it is read.
KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonl.gz": "gzip",
    ".ndjson.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".ndjson.zst": "zstd",
    ".json": "json",
    ".parquet": "parquet",
}
READ_AHEAD = 1 << 20  # bytes
_REFUSED = (".arrow", ".csv", ".tsv", ".xz", ".bz2", ".zip", ".tar", ".gz", ".zst")


@dataclass(frozen=True)
class Input:
    """A file. `name` is relative to its source, so that it doesn't depend on where the data lie."""

    name: str
    place: str  # path or address
    size: int  # bytes
    told: str | None = None  # its identity as the store gave it with the size

    def open(self) -> IO[bytes]:
        if is_remote(self.place):
            return open_remote(self.place)
        return open(self.place, "rb", buffering=READ_AHEAD)

    @property
    def identity(self) -> str:
        """Digest of the content; of a remote file what its store said about it (address, size, ETag)."""
        return self.told or file_digest(Path(self.place))

    @property
    def state(self) -> tuple[int, int | str]:
        """Cheap facts, asked anew, that change when somebody writes to the file."""
        if is_remote(self.place):
            return look(self.place)
        facts = os.stat(self.place)
        return facts.st_size, facts.st_mtime_ns


def listing_digest(location: str) -> str:
    """What changes when the remote files of an address do: names, sizes and what their store says of them."""
    return sha256_text(to_json([[file.name, file.size, file.identity] for file in find_files(location)]))


def open_input(place: str) -> Input:
    """The file at an address or path."""
    size, told = look(place) if is_remote(place) else (os.path.getsize(place), None)
    return Input(place.rpartition("/")[2], place, size, told)


def kind_of(place: str) -> str:
    """How a file is read; a file that was named although its suffix says nothing is JSON Lines."""
    return next((KINDS[suffix] for suffix in sorted(KINDS, key=len, reverse=True) if place.endswith(suffix)), "lines")


def find_files(location: str) -> list[Input]:
    """The files that a path, a folder, a glob or an address means, sorted by name. UserError: none."""
    files = _find_remote(location) if is_remote(location) else _find_local(Path(location))
    if not files:
        fix = f"give a file ({', '.join(KINDS)}), a folder with some, or a glob"
        raise UserError(Problem(f"no rows at {location}", fix=fix))
    for file in files:
        if not file.place.endswith(tuple(KINDS)) and file.place.endswith(_REFUSED):
            raise UserError(
                Problem(f"{file.place} is in no format that is read", fix=f"convert it: {', '.join(KINDS)}")
            )
    return files


def _find_local(location: Path) -> list[Input]:
    if location.is_dir():
        paths = [path for path in files_below(location) if path.name.endswith(tuple(KINDS))]
        root = location
    else:
        matches = [str(location)] if location.exists() else glob.glob(str(location), recursive=True)
        paths = sorted(Path(match) for match in matches if os.path.isfile(match))
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else location.parent
    try:
        return [Input(path.relative_to(root).as_posix(), str(path), path.stat().st_size) for path in paths]
    except OSError as error:  # such as a link to nowhere: to pass over it would be to lose its rows
        fix = "mend it, or take it out of the folder"
        raise UserError(Problem(f"{error.filename} can't be read: {error.strerror}", fix=fix)) from None


def _find_remote(location: str) -> list[Input]:
    try:
        found = listed(location, tuple(KINDS))
    except OSError as error:
        what = f"{location} can't be listed: {error}"
        fix = "check the address, and the credentials that the store's own tools use"
        raise UserError(Problem(what, fix=fix)) from None
    scheme = location.partition("://")[0]
    folders = [place.partition("://")[2].rpartition("/")[0] for place, *_ in found]
    root = f"{scheme}://{os.path.commonpath(folders)}/" if found else ""
    return [Input(place.removeprefix(root), place, size, told) for place, size, told in found]
