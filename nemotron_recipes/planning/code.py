"""Which code runs: the package's own files, digested and taken along, and what git says of the checkout around them.

A run gets a copy of the sources as they lie on disk (uncommitted changes included), so that a stage that starts hours
later runs what its Plan says, whatever was edited meanwhile.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.remote import transport
from nemotron_recipes.fsio import fsync_tree
from nemotron_recipes.sources import LARGEST, SNAPSHOT, digest_of, snapshot_of, sorted_out
from nemotron_recipes.spec import Code, sha256_text

PACKAGE = Path(__file__).resolve().parent.parent


def describe_code() -> Code:
    """Digest of every source file of the package; commit and uncommitted changes where it lies in a git checkout."""
    try:
        installed = version("nemotron-recipes")
    except PackageNotFoundError:
        installed = "uninstalled"
    commit = _git("rev-parse", "HEAD")
    diff = git_diff() if commit else None
    changed = _git("status", "--porcelain", "--untracked-files=all", "--no-renames") if commit else None
    return Code(
        digest=digest_of(PACKAGE),
        version=installed,
        git_commit=commit.strip() if commit else None,
        git_diff_digest=sha256_text(diff) if diff else None,
        uncommitted=tuple(sorted(line[3:] for line in (changed or "").splitlines())),
        left_behind=tuple(f"{name}: {reason}" for name, reason in sorted_out(PACKAGE)[1]),
    )


def snapshot(run_dir: Path, code: Code, source: Path | None = None) -> None:
    """Copy the sources (`source`, or this package's own) into the run folder. UserError: they are not what `code` was
    planned with any more.

    A later attempt finds the copy of the first and leaves it alone: somebody may be running it.
    """
    source = source or PACKAGE
    target = snapshot_of(run_dir)
    if target.is_dir() and digest_of(target) == code.digest:
        return
    shutil.rmtree(target.parent, ignore_errors=True)
    for path in sorted_out(source)[0]:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if digest_of(target) != code.digest:
        raise UserError(Problem("the code changed while the plan was being submitted", str(source), "run it again"))
    fsync_tree(target.parent)


def python_path(run_dir: Path) -> str:
    """PYTHONPATH of the workers: the snapshot before what the user's own holds (made absolute)."""
    if transport.current().name:  # the paths are of another machine
        return str(run_dir / SNAPSHOT)
    own = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.pathsep.join([str(run_dir / SNAPSHOT), *own])


def git_diff() -> str | None:
    """What the checkout has beyond its commit, untracked files included, as a patch; None without git.

    Left out, as they may hold secrets or data: untracked files that are large or named like credentials. A second
    index lets git show untracked files as new ones and leaves the checkout's own index as it is.
    """
    untracked = [name for name in (_git("ls-files", "--others", "--exclude-standard", "-z") or "").split("\0") if name]
    kept = [name for name in untracked if _belongs_in_a_patch(PACKAGE.parent / name)]
    index = _git("rev-parse", "--path-format=absolute", "--git-path", "index") if kept else None
    if index is None:
        return _git("diff", "HEAD", "--binary")
    with tempfile.TemporaryDirectory() as folder:
        second = Path(folder, "index")
        shutil.copy2(index.rstrip("\n"), second)  # with its time: git tells by it which files may have changed since
        environment = {**os.environ, "GIT_INDEX_FILE": str(second)}
        add = ("--literal-pathspecs", "add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
        _git(*add, env=environment, stdin="\0".join(kept))
        return _git("diff", "HEAD", "--binary", env=environment)


def _belongs_in_a_patch(path: Path) -> bool:
    """Whether an untracked file is copied into run folders; .env, *.pem, id_rsa and the like never are."""
    named_so = path.name.startswith((".env", ".netrc", "id_")) or path.suffix in (".pem", ".key", ".p12", ".token")
    return path.is_file() and not path.is_symlink() and not named_so and path.stat().st_size <= LARGEST


def _git(*arguments: str, env: Mapping[str, str] | None = None, stdin: str = "") -> str | None:
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *arguments],
            input=stdin.encode("utf-8", "surrogateescape"),
            capture_output=True,
            timeout=20,
            check=False,
            env=env,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None
