"""A store on a network file system: two caching mounts of one folder, locks that lie, a server that falls silent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import caching_mounts

ROOT = Path(__file__).parents[2]
LYING = """
int flock(int fd, int op) { return 0; }
int lockf(int fd, int op, long length) { return 0; }
int link(const char *a, const char *b) { return 0; }
"""
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not caching_mounts.ABLE, reason="needs root, /dev/fuse, and Debian's sshfs, openssh-sftp-server"
    ),
]


def run(folder: Path, what: str, **environ: str) -> str:
    private = ["unshare", "--mount", "--propagation", "private"]
    command = [*private, sys.executable, "-m", "tests.helpers.caching_mounts", str(folder), what]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("processes", [8, 32])
def test_processes_behind_two_caching_mounts_get_contiguous_numbers(tmp_path: Path, processes: int) -> None:
    assert run(tmp_path, str(processes)).startswith(f"{processes} processes over two mounts: {3 * processes} versions")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_locks_that_lie_change_nothing(tmp_path: Path) -> None:
    """The store takes no locks; a library that says yes to every one, and links nothing, shows it."""
    source, library = tmp_path / "lying.c", tmp_path / "lying.so"
    source.write_text(LYING)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    assert "32 processes" in run(tmp_path, "32", LD_PRELOAD=str(library))


@pytest.mark.parametrize("when", ["blocked", "falls-silent"])
def test_a_server_that_falls_silent_hangs_no_command(tmp_path: Path, when: str) -> None:
    """Before a command begins, and in the middle of one."""
    assert "no command hung" in run(tmp_path, when)
