"""Which code runs: a digest of the package's own files, and what git says of the checkout around it."""

from __future__ import annotations

import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nemotron_recipes.spec import Code, sha256_text

PACKAGE = Path(__file__).resolve().parent.parent
COUNTED = {".py", ".jinja", ".json"}


def describe_code() -> Code:
    """Digest of every source file of the package, and commit and uncommitted diff where it lies in a git checkout."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in COUNTED):
        name = path.relative_to(PACKAGE).as_posix()
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    try:
        installed = version("nemotron-recipes")
    except PackageNotFoundError:
        installed = "uninstalled"
    commit = _git("rev-parse", "HEAD")
    diff = git_diff() if commit else None
    return Code(
        digest="sha256:" + digest.hexdigest(),
        version=installed,
        git_commit=commit.strip() if commit else None,
        git_dirty=bool(diff),
        git_diff_digest=sha256_text(diff) if diff else None,
    )


def git_diff() -> str | None:
    """Uncommitted changes to tracked files of the checkout, as a patch; None without git."""
    return _git("diff", "HEAD", "--binary")


def _git(*arguments: str) -> str | None:
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *arguments], capture_output=True, timeout=20, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None
