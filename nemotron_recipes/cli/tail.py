"""Reading files that grow: in pieces of bounded size, safe to be shown on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

LONGEST = 64 * 1024  # bytes of one line; a longer one (a bar drawn with carriage returns) is cut into several


class Tail:
    """New whole lines of a growing file, whatever its size. One that became shorter is read from its beginning.

    last   begin so many bytes before the end that it has now; the first line may then lack its beginning
    """

    def __init__(self, path: Path, last: int | None = None):
        self.path = path
        size = path.stat().st_size if last is not None and path.exists() else 0
        self.offset = max(0, size - (last or 0)) if last is not None else 0

    def lines(self, whole: bool = True) -> Iterator[str]:
        """What has come since the last call; with `whole` unset, a last line without its end too.

        Of a line that was drawn over with carriage returns only what was seen last.
        """
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return
        if size < self.offset:
            self.offset = 0
        if size == self.offset:
            return
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            while piece := handle.readline(LONGEST):
                if not piece.endswith(b"\n"):
                    if len(piece) == LONGEST:
                        piece = _at_a_letter(piece)
                        handle.seek(self.offset + len(piece))
                    elif whole:
                        return
                self.offset += len(piece)
                yield piece.decode("utf-8", "replace").rstrip("\r\n").rsplit("\r", 1)[-1]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The same of a JSONL file; a line that a crash tore is left out."""
        for line in self.lines():
            with suppress(json.JSONDecodeError):
                yield json.loads(line)


def _at_a_letter(piece: bytes) -> bytes:
    """`piece`, cut before the UTF-8 character that its end would tear apart."""
    for back in range(1, 4):
        if piece[-back] & 0xC0 != 0x80:  # no continuation byte: a character begins here
            return piece[:-back] if piece[-back] >= 0xC0 else piece
    return piece
