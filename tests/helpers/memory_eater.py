"""Takes more and more memory until somebody stops it; on SIGTERM it says that it has saved. At most 6 GiB."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType

PIECE = 64 << 20
MOST = 6 << 30


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))

    def save(number: int, frame: FrameType | None) -> None:
        Path("saved").write_text("yes")
        os._exit(130)

    signal.signal(signal.SIGTERM, save)
    eaten = []
    while True:
        eaten.append(b"x" * PIECE)
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
