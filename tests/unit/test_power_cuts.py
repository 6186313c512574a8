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


@pytest.mark.long
@pytest.mark.skipif(not ABLE, reason="needs root, mkfs.ext4 and a loop device")
def test_what_was_acknowledged_survives_300_power_cuts(tmp_path: Path) -> None:
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.helpers.power_cuts"]
    done = subprocess.run([*command, str(tmp_path), "300"], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("300 cuts")
