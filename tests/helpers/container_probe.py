"""What the container tests run in place of a worker: it writes down what it finds where it runs, then is a probe.

Its orders stand in `files/look.json` of the stage's folder: texts = files to read, writes = files to try to make,
names = variables. One answer per node: seen-NODE.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.helpers import probe


def main() -> int:
    stage = Path(sys.argv[1])
    orders = json.loads((stage / "files" / "look.json").read_text())
    seen = {
        "texts": {name: Path(name).read_text() if Path(name).is_file() else None for name in orders["texts"]},
        "writes": {name: _write(Path(name)) for name in orders["writes"]},
        "env": {name: os.environ.get(name) for name in orders["names"]},
        "mounts": [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()],
        "cwd": os.getcwd(),
        "host": os.uname().nodename,
        "python": sys.executable,
    }
    partial = stage / f"seen-{os.environ['SLURM_NODEID']}.tmp"
    partial.write_text(json.dumps(seen))
    partial.rename(partial.with_suffix(".json"))
    os.chdir(stage)
    return probe.main()


def _write(path: Path) -> str:
    """The word for the error; "" when it worked."""
    try:
        path.write_text("written\n")
    except OSError as error:
        return error.strerror
    return ""


if __name__ == "__main__":
    sys.exit(main())
