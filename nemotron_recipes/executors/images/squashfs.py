"""Whether a squashfs file is whole. Standard library only: it is asked on the machine where the file lies."""

from __future__ import annotations

import os

_MAGIC = b"hsqs"  # https://dr-emann.github.io/squashfs/#_the_superblock
_HEAD = 96  # bytes of the superblock; the size that is used stands at 40


def is_whole(file: str | os.PathLike[str]) -> bool:
    """Whether it is a squashfs file, and as long as it says."""
    try:
        with open(file, "rb") as handle:
            head, size = handle.read(_HEAD), os.fstat(handle.fileno()).st_size
    except OSError:
        return False
    return len(head) == _HEAD and head.startswith(_MAGIC) and int.from_bytes(head[40:48], "little") <= size
