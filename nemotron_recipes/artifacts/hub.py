"""Repositories of the Hugging Face hub: which commit a name means, and all of one in a cache that jobs can read.

huggingface_hub does the work: it resumes each file where it stopped and waits as long as a rate limit says. What is
added here: the commit is fixed before the first byte, the room is looked at, what fails is tried again, and in the end
every file is there at its size.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import JobFailed, Problem, UserError

TIMEOUT = 10  # seconds for one question
PAUSES = (5.0, 30.0, 120.0, 300.0)  # seconds between tries, after what the hub itself asked to wait
SPARE = 1 << 30  # bytes that stay free
_PASSING = (408, 429, 500, 502, 503, 504)  # HTTP's words for: ask again
# What no time to wait mends: a full disk, a folder that isn't one or is somebody else's.
_LASTING = (*(errno.ENOSPC, errno.EDQUOT, errno.EROFS), *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST))
_PLANNED = "give a local path, pin it (hf://ORG/NAME@COMMIT), or look at the plan with --dry-run --offline"
_FETCHED = "look its name and revision up on the hub; one that is gated or private takes a token in HF_TOKEN"


@dataclass(frozen=True)
class Repository:
    """One repository at one commit. `files`: name -> bytes."""

    name: str
    kind: str  # "model" or "dataset"
    commit: str
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def commit_of(name: str, revision: str | None, kind: str) -> str:
    """The commit that a branch, a tag or nothing (main) means now. UserError: the hub doesn't say."""
    return _ask(name, revision, kind, False, _PLANNED, ()).commit


def look_up(name: str, revision: str | None, kind: str, say: Callable[[str], None]) -> Repository:
    """What the hub says of a repository, with its files' sizes; waits where it asks to. UserError: it refuses."""
    return _ask(name, revision, kind, True, _FETCHED, PAUSES, say)


def _ask(
    name: str,
    revision: str | None,
    kind: str,
    sizes: bool,
    fix: str,
    pauses: tuple[float, ...],
    say: Callable[[str], None] = lambda text: None,
) -> Repository:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    api = HfApi()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    for pause in (*pauses, None):
        try:
            found = ask(name, revision=revision, timeout=TIMEOUT, files_metadata=sizes)
            break
        except HfHubHTTPError as error:
            if pause is None or error.response.status_code not in _PASSING:
                what = f"the hub refuses {name}@{revision or 'main'}: {_reason(error)}"
                raise UserError(Problem(what, fix=fix)) from None
            _wait(name, error, pause, say)
        except (HTTPError, OSError, OfflineModeIsEnabled) as error:  # no route, no name, a time-out
            what = f"the hub can't be asked for the commit of {name}: {_reason(error)}"
            raise UserError(Problem(what, fix=fix)) from None
    if not found.sha:
        raise UserError(Problem(f"the hub names no commit for {name}", fix=fix))
    return Repository(name, kind, found.sha, {file.rfilename: file.size or 0 for file in found.siblings or ()})


def fetch(repository: Repository, home: Path, say: Callable[[str], None], pauses: tuple[float, ...] = PAUSES) -> Path:
    """All files of a repository below `home` (HF_HOME), whole; returns their folder. What is there already stays.

    UserError: no room, or the hub refuses. JobFailed: it failed once more than there are pauses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    how: Any = {
        "repo_type": repository.kind,
        "revision": repository.commit,
        "cache_dir": home / "hub",
        "max_workers": 4,
    }
    _check_room(repository, home)
    for pause in (*pauses, None):
        try:
            folder = Path(snapshot_download(repository.name, **how))
            missing = _missing(repository, folder)
            if not missing:
                return folder
            failed: BaseException = OSError(f"{len(missing)} file(s) are not whole: {', '.join(missing[:3])}")
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            fix = "accept its licence on the hub, and set HF_TOKEN"
            raise UserError(Problem(f"the hub refuses {repository.name}: {_reason(error)}", fix=fix)) from None
        except (HTTPError, OSError) as error:
            if getattr(error, "errno", None) in _LASTING:
                what = f"{repository.name} can't be written: {_reason(error)}"
                fix = "make room or name another folder (--to, or hf_cache in the profile); the same command goes on"
                raise UserError(Problem(what, str(home), fix)) from None
            failed = error
        if pause is not None:
            _wait(repository.name, failed, pause, say)
    raise JobFailed(f"{repository.name}@{repository.commit}: {_reason(failed)}\n    the same command goes on from here")


def _wait(name: str, error: BaseException, pause: float, say: Callable[[str], None]) -> None:
    """As long as the hub's answer asks for (Retry-After, or its RateLimit's `t`), else for `pause` seconds."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = re.fullmatch(r"\s*(\d+)\s*", headers.get("retry-after", "")) or re.search(
        r";t=(\d+)", headers.get("ratelimit", "")
    )
    seconds = float(asked[1]) if asked else pause
    say(f"{name}: {_reason(error)}; trying again in {seconds:g} s")
    time.sleep(seconds)


@contextmanager
def online() -> Iterator[None]:
    """UserError where HF_HUB_OFFLINE is set: whoever fetches needs the hub."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        raise UserError(Problem("HF_HUB_OFFLINE is set", "environment", "unset it for this command"))
    yield


def _check_room(repository: Repository, home: Path) -> None:
    there = home
    while not there.is_dir():
        there = there.parent
    blobs = home / "hub" / f"{repository.kind}s--{repository.name.replace('/', '--')}" / "blobs"
    have = sum(file.stat().st_size for file in blobs.iterdir()) if blobs.is_dir() else 0
    need, free = max(0, repository.bytes - have), shutil.disk_usage(there).free
    if need + SPARE > free:
        what = f"{repository.name} takes {need / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free"
        raise UserError(Problem(what, str(home), "name another folder: --to, or hf_cache in the profile"))


def _missing(repository: Repository, folder: Path) -> list[str]:
    def whole(name: str, size: int) -> bool:
        path = folder / name
        return path.is_file() and path.stat().st_size == size

    return sorted(name for name, size in repository.files.items() if not whole(name, size))


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
