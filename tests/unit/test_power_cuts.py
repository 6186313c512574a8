"""What was acknowledged survives a power cut: tests/helpers/power_cuts.py, which needs root and a loop device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABLE = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mkfs.ext4") and Path("/dev/loop-control").exists()


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not ABLE, reason="needs root, mkfs.ext4 and a loop device"),
]
COMMAND = ("unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.helpers.power_cuts")


def cuts(folder: Path, number: int, *mutant: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, str(folder), str(number), *mutant]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


def test_what_was_acknowledged_survives_300_power_cuts(tmp_path: Path) -> None:
    done = cuts(tmp_path, 300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("300 cuts")


@pytest.mark.parametrize(
    "mutant",
    [
        *("fsio.fsync_folder", "fsio.fsync_file", "rundir.fsync_file", "closing.fsync_all", "closing.close"),
        *("artifacts.contents.write", "artifacts.store.fsync_tree"),
        *("worker.trl.checkpoints.fsync_tree", "worker.trl.checkpoints.seal_inside"),
    ],
)
def test_a_removed_precaution_is_noticed(tmp_path: Path, mutant: str) -> None:
    """What is not forced to the disk is lost at the first cuts: ext4 writes it seconds later."""
    done = cuts(tmp_path, 60, mutant)
    assert done.returncode == 1, done.stdout
    assert "AssertionError" in done.stderr or "damaged" in done.stderr or "has changed" in done.stderr, done.stderr
