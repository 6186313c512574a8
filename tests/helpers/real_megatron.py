"""The real Megatron-Bridge, in an environment of its own: long tests alone ask for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = "megatron_bridge-0.3.1"


def python(checked: bool = False) -> Path:
    """An interpreter that has it: of the environment that NEMOTRON_MEGATRON_VENV names, else of one below .schemas/.

    That one is made (about 1.5 GB). `checked`: the checked-in schema is held against what it has, too.
    """
    ready = os.environ.get("NEMOTRON_MEGATRON_VENV")
    if checked or not ready:
        build = [sys.executable, ROOT / "tools" / "schemas" / "build.py", "--check", VERSION]
        subprocess.run([*build, *(["--venv", ready] if ready else [])], check=True)
    return Path(ready or ROOT / ".schemas" / VERSION) / "bin" / "python"
