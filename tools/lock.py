#!/usr/bin/env python3
"""Pin anew: rewrite the pins of constraints.txt for pyproject.toml, keeping the versions that still fit.

Resolves with uv (`pip install uv`; not a dependency of the project) for every supported Python at once, then shortens
the markers: a constraint only matters where its package is wanted, so just the split by Python version remains.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = ("test", "s3", "gs")
BUILD_TOOLS = "setuptools\nwheel\nhatchling\neditables\n"


def main() -> int:
    text = CONSTRAINTS.read_text(encoding="utf-8")
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    with tempfile.TemporaryDirectory() as room:
        pins, tools = Path(room) / "pins.txt", Path(room) / "tools.in"
        pins.write_text(text, encoding="utf-8")  # uv prefers the versions that its output file already holds
        tools.write_text(BUILD_TOOLS, encoding="utf-8")
        resolve = [
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.10"),
            *("--no-python-downloads", "--no-annotate", "--no-header", "--output-file", str(pins)),
            *(word for extra in EXTRAS for word in ("--extra", extra)),
            *(str(ROOT / "pyproject.toml"), str(tools)),
        ]
        if subprocess.call(resolve) != 0:
            print("error: uv could not resolve the dependencies (is it there? pip install uv)", file=sys.stderr)
            return 1
        CONSTRAINTS.write_text(header + shorten(pins.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def shorten(resolved: str) -> str:
    """One line per package; two with a Python marker where an old Python needs an older version."""
    rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for line in resolved.splitlines():
        pin, _, marker = line.partition(" ; ")
        name, _, version = pin.partition("==")
        rows[name].append((version, marker))
    lines = []
    for name, versions in sorted(rows.items()):
        if len(versions) == 1:
            lines.append(f"{name}=={versions[0][0]}")
            continue
        for version, marker in versions:
            bounds = sorted(set(re.findall(r"python_full_version (>=|<) '(3\.\d+)'", marker)) - {("<", "3.15")})
            if not bounds:
                raise SystemExit(f"error: {name} splits by more than the Python version: {marker}")
            lines.append(f"{name}=={version} ; " + " and ".join(f'python_version {op} "{v}"' for op, v in bounds))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
