"""Writes that are whole or absent, and content digests. Standard library only."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

HASHERS = 4  # threads
MANY_BYTES = 64 << 20
MANY_FILES = 100  # files from which on several are fsynced at once
AT_ONCE = 8


def write_atomic(path: Path, text: str | bytes, mode: int = 0o644) -> None:
    """Replace `path` by `text`: a reader, or a crash, sees the old file or the new one, never a part.

    The temporary file lies in the same folder; file and folder are fsynced before this returns.
    """
    data = text.encode("utf-8") if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
            if os.fstat(handle.fileno()).st_size != len(data):
                raise OSError(errno.EIO, "a write was not carried out as the system said", str(path))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    fsync_file(folder)


def fsync_tree(root: Path) -> None:
    """fsync every file and folder below `root`, and `root`."""
    fsync_all(
        [os.path.join(folder, name) for folder, _, files in os.walk(root, topdown=False) for name in (*files, "")]
    )


def fsync_all(paths: Sequence[str | Path]) -> None:
    """The same of these files and folders."""
    if len(paths) < MANY_FILES:
        for path in paths:
            fsync_file(path)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(AT_ONCE) as pool:  # the file system writes them together: ten times as fast
        for _ in pool.map(fsync_file, paths):
            pass


def fsync_file(path: str | Path) -> None:
    """Make what stands in a file durable, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of a file's bytes, read in pieces that stay in the CPU's cache."""
    digest, room = hashlib.sha256(), memoryview(bytearray(1 << 18))
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(room):
            digest.update(room[:count])
    return "sha256:" + digest.hexdigest()


def digest_of_start(path: Path, size: int, each: Callable[[], None] = lambda: None) -> str:
    """The same of its first `size` bytes; of all where there are fewer. each: called between pieces, and may raise."""
    digest, left = hashlib.sha256(), size
    with open(path, "rb") as handle:
        while left and (piece := handle.read(min(left, 1 << 20))):
            each()
            digest.update(piece)
            left -= len(piece)
    return "sha256:" + digest.hexdigest()


def files_below(root: Path) -> list[Path]:
    """Every regular file below `root`, in a stable order (by relative POSIX path)."""
    return _ordered(root, (Path(folder, name) for folder, _, files in os.walk(root) for name in files))


def tree_digest(root: Path, files: Iterable[Path] | None = None) -> str:
    """Digest of a file or of a folder: relative names and contents; times, modes and owners don't count."""
    return file_digest(root) if root.is_file() else digest_of(digests_below(root, files))


def digests_below(root: Path, files: Iterable[Path] | None = None) -> dict[str, str]:
    """Relative POSIX name -> digest, of all files below a folder or of some, ordered by name."""
    ordered = _ordered(root, files) if files is not None else files_below(root)
    names = (path.relative_to(root).as_posix() for path in ordered)
    return dict(zip(names, _file_digests(ordered), strict=True))


def digest_of(digests: Mapping[str, str]) -> str:
    """The digest of the folder that has just these files."""
    digest = hashlib.sha256()
    for name in sorted(digests):
        digest.update(f"{name}\0{digests[name]}\n".encode("utf-8", "surrogateescape"))
    return "sha256:" + digest.hexdigest()


def _file_digests(files: list[Path]) -> Iterable[str]:
    """Of much, several at once: reading and hashing let go of the interpreter."""
    if len(files) < 2 or sum(path.stat().st_size for path in files) < MANY_BYTES:
        return map(file_digest, files)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(HASHERS) as pool:
        return list(pool.map(file_digest, files))


def path_digest(pattern: str) -> str:
    """Digest of what a local path or glob names now; FileNotFoundError when that is nothing.

    The files of a glob count by their names below their deepest common folder.
    """
    if os.path.exists(pattern):
        return tree_digest(Path(pattern))
    files = [Path(found) for found in glob.glob(pattern, recursive=True) if os.path.isfile(found)]
    if not files:
        raise FileNotFoundError(f"nothing at {pattern}")
    return tree_digest(Path(os.path.commonpath([path.parent for path in files])), files)


def _ordered(root: Path, files: Iterable[Path]) -> list[Path]:
    """By relative POSIX path as text. Comparing Path objects would order a/b and a-b differently."""
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())
