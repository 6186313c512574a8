"""Digests of images for which containers/images.toml has none: images.lock.json beside env.toml, to be kept with the
project. `nemotron images check` and `import` write the first one that they see; from then on a moved tag shows."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from nemotron_recipes.env_file import find_env_file
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.images.enroot import Reference
from nemotron_recipes.fsio import write_atomic

NAME = "images.lock.json"


def name_of(image: Reference) -> str:
    """What a tag is called there, however it was written."""
    return Reference(image.registry, image.repository, image.tag or "latest").for_docker


def file() -> Path | None:
    """None without an env.toml: there is no project that it could belong to."""
    found = find_env_file(Path.cwd())
    return found.with_name(NAME) if found else None


def digests() -> dict[str, str]:
    """Name -> digest. UserError: the file holds something else."""
    path = file()
    if path is None or not path.is_file():
        return {}
    try:
        return {str(name): str(entry["digest"]) for name, entry in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{path} can't be read: {type(error).__name__}: {error}"
        raise UserError(Problem(what, fix="take it out: nemotron images check makes it anew")) from None


def keep(seen: Mapping[str, str]) -> Path | None:
    """Write these beside those that are there, in their place where they are others; the file, if it has changed."""
    env_file, path, known = find_env_file(Path.cwd()), file(), digests()
    if env_file is None or path is None or all(known.get(name) == digest for name, digest in seen.items()):
        return None
    today = datetime.now(timezone.utc).date().isoformat()
    try:
        with _alone(env_file):
            known = digests()  # somebody may have written meanwhile
            tree = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            new = {name: digest for name, digest in seen.items() if known.get(name) != digest}
            tree |= {name: {"digest": digest, "seen": today} for name, digest in new.items()}
            write_atomic(path, json.dumps(tree, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(Problem(f"{path} can't be written: {error.strerror}")) from None
    return path


@contextmanager
def _alone(env_file: Path) -> Iterator[None]:
    """Of several that write at once each waits for those before it. The lock is on env.toml: it is there already."""
    with ExitStack() as stack:
        with suppress(OSError):  # it may not be written to, or the file system has no locks
            held = stack.enter_context(open(env_file, "ab"))
            fcntl.flock(held.fileno(), fcntl.LOCK_EX)
        yield
