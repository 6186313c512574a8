"""`nemotron` as a user types it: a whole process in some folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST = 900  # seconds


def nemotron(cwd: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """Run a command that must end with `code`; its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "nemotron_recipes", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout
