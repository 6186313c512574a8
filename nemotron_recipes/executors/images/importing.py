"""One import of an image into a squashfs file, on the machine that has enroot or a cluster's commands: called through
`transport.call`. It comes to its end there also when nobody waits for it any more, and then lies there under its name:
who asks again waits for it, or finds it. Standard library only."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.images import registry
from nemotron_recipes.executors.images.enroot import parse_reference
from nemotron_recipes.executors.images.squashfs import is_whole
from nemotron_recipes.fsio import fsync_folder

_KERNELS_WORDS = {"amd64": "x86_64", "arm64": "aarch64"}  # enroot's --arch takes these


def look_up(written: str) -> tuple[str, list[str]]:
    """(digest, architectures) as the registry tells this machine, with the credentials that lie here. UserError."""
    found = registry.look_up(parse_reference(written))
    return found.digest, list(found.architectures)


def bring(source: str, architecture: str, final: str, before: Sequence[str] = ()) -> str:
    """`final` is whole afterwards, made by `enroot import docker://SOURCE` unless it is there; else enroot's words.

    before   words in front of the command: `srun ...`, to have it done on a node
    Of several imports at once one works, the others wait for it; where the file system has no locks each works for
    itself. What is not whole never has the file's name. UserError: its folder can't be written, or there is no enroot.
    """
    file = Path(final)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file) as alone:
            if is_whole(file):
                return ""
            if alone:  # of imports that were killed
                for left in file.parent.glob(f"{_literal(file.stem)}.*.partial"):
                    left.unlink(missing_ok=True)
            # Its own name: where a lock lies, two imports do the same work twice, but never write into one file.
            partial = file.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
            try:
                failed = _enroot_import(source, architecture, partial, before)
                if failed:
                    return failed
                with open(partial, "rb") as written:
                    os.fsync(written.fileno())
                os.replace(partial, file)
                fsync_folder(file.parent)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            Problem(f"{error.filename or file.parent} can't be written: {error.strerror}", "--to")
        ) from None
    return ""


def _enroot_import(source: str, architecture: str, partial: Path, before: Sequence[str]) -> str:
    arch = _KERNELS_WORDS.get(architecture, architecture)
    argv = [*before, "enroot", "import", "--arch", arch, "--output", str(partial), f"docker://{source}"]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        what = f"there is no {argv[0]} here"
        fix = "run it where enroot is, on a node with --run PROFILE, or use docker: nemotron images import --docker"
        raise UserError(Problem(what, fix=fix)) from None
    if done.returncode:
        return f"{' '.join(argv)} ended with {done.returncode}:\n{done.stderr.strip()[-2000:]}"
    return "" if is_whole(partial) else f"{argv[0]} ended well, but what it wrote is no whole squashfs file"


@contextmanager
def _alone(final: Path) -> Iterator[bool]:
    """Hold the lock on that name, waiting for it; False where the file system has none."""
    with open(final.with_suffix(".lock"), "ab") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
