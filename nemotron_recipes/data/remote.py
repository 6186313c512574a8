"""Object storage through fsspec: what lies at an address, what its store says of it, and its bytes.

A listing is never taken from memory: a file that is replaced meanwhile must be seen. What the libraries of a store
raise becomes `StoreError`, an OSError like that of any file.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.spec import sha256_text, to_json

SCHEMES = ("s3://", "gs://", "hf://", "memory://")
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
# Whatever of these a store tells changes with the content; of time stamps only where there is nothing better.
_CONTENT = ("ETag", "etag", "generation", "md5Hash", "crc32c", "blob_id")
_TIMES = ("LastModified", "updated", "mtime", "created")
_READ_AHEAD = 4 << 20  # bytes per request
# Module -> what its calls raise that is no OSError.
_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "gcsfs.retry": ("HttpError",),
    "httpx": ("HTTPError",),
    "httpx2": ("HTTPError",),
    "fsspec.exceptions": ("FSTimeoutError",),
}


class StoreError(OSError):
    """A store could not be reached, or refused."""


def is_remote(place: str) -> bool:
    return place.startswith(SCHEMES)


def listed(location: str, suffixes: tuple[str, ...]) -> list[tuple[str, int, str]]:
    """(address, bytes, identity) of the files that an address, a prefix or a glob means, sorted; of a prefix those that
    end in one of `suffixes`. None at all: an empty list. OSError: the store can't be asked, or there is no such bucket.
    """
    files = filesystem(location)
    scheme, _, path = location.partition("://")
    with _translated(location):
        if any(sign in path for sign in "*?["):
            found = {name: facts for name, facts in files.glob(path, detail=True).items() if facts["type"] == "file"}
        else:
            every = files.find(path, detail=True)
            found = {name: facts for name, facts in every.items() if name.endswith(suffixes) or _same(name, path)}
        if not found:
            _look_at_bucket(files, path)
    places = {f"{scheme}://{name.lstrip('/')}": facts for name, facts in found.items()}
    return sorted((place, *_told_of(place, facts)) for place, facts in places.items())


def look(place: str) -> tuple[int, str]:
    """(bytes, identity), asked anew. The identity changes when the content does. OSError: it isn't there, or the store
    can't be asked."""
    files = filesystem(place)
    with _translated(place):
        return _told_of(place, files.info(place))


def open_remote(place: str) -> IO[bytes]:
    """Reads by ranges. OSError: now or later, as `look`."""
    with _translated(place):
        raw = filesystem(place).open(place, "rb", block_size=_READ_AHEAD, cache_type="readahead")
    if cache := getattr(raw, "cache", None):
        cache.fetcher = _exactly(cache.fetcher)
    return io.BufferedReader(_Raw(raw, place), 1 << 20)


def _exactly(fetch: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
    """The clients take whatever comes as the range that they asked for: from a server or a proxy that knows no ranges
    the start of the file, again and again."""

    def fetched(start: int, end: int) -> bytes:
        data = fetch(start, end)
        if len(data) != end - start:
            what = f"asked for the bytes {start} to {end}, it gives {len(data)}"
            raise StoreError(f"{what}: the file changed, or something on the way ignores ranges")
        return data

    return fetched


def filesystem(place: str) -> Any:
    """The fsspec file system of an address, which remembers no listings. UserError: its package is missing."""
    scheme = place.partition("://")[0]
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        package = EXTRAS.get(scheme, "fsspec")
        what = f"{place}: reading from {scheme}:// needs the package '{package}'"
        raise UserError(Problem(what, fix=f"pip install 'nemotron-recipes[{scheme}]'")) from None
    except ValueError as error:
        raise UserError(Problem(f"{place}: {error}", fix=nearest(scheme, EXTRAS))) from None


class _Raw(io.RawIOBase):
    """A file of fsspec whose errors are OSErrors."""

    def __init__(self, file: Any, place: str):
        self._file = file
        self._place = place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _translated(self._place):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _told_of(place: str, facts: dict[str, Any]) -> tuple[int, str]:
    """(bytes, identity): address, size, and what the store says of the content (its ETag or generation)."""
    told = {key: str(facts[key]) for key in _CONTENT if facts.get(key)}
    told = told or {key: str(facts[key]) for key in _TIMES if facts.get(key)}
    return int(facts["size"]), f"remote:{sha256_text(to_json([place, int(facts['size']), told]))}"


def _look_at_bucket(files: Any, path: str) -> None:
    """A prefix under which nothing lies and a bucket that isn't there look alike to `find` and `glob`."""
    bucket = path.partition("/")[0]
    if bucket and not any(sign in bucket for sign in "*?["):
        files.ls(bucket)


def _same(name: str, path: str) -> bool:
    return name.strip("/") == path.strip("/")


@contextmanager
def _translated(place: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place} is not there{_words(error)}") from None
    except PermissionError as error:
        raise StoreError(f"the store refuses{_words(error)}") from None
    except TimeoutError as error:
        raise StoreError(f"the store doesn't answer{_words(error)}") from None
    except _errors_of_stores() as error:
        raise StoreError(f"{type(error).__name__}: {error}") from None


def _errors_of_stores() -> tuple[type[BaseException], ...]:
    """Of those libraries that have been loaded: no other can have raised anything."""
    return tuple(
        getattr(sys.modules[module], name)
        for module, names in _ERRORS.items()
        if module in sys.modules
        for name in names
    )


def _words(error: OSError) -> str:
    lines = str(error).splitlines()
    return f": {lines[0]}" if lines and lines[0] else ""
