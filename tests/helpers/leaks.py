"""Looks for a secret in everything that was written: plain, and as base64, URL and JSON would write it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, quote_plus


def forms(secret: str) -> set[bytes]:
    """The bytes that give a secret away. Base64 depends on where it begins: three ways, less their ends."""
    raw = secret.encode()
    found = {raw, json.dumps(secret)[1:-1].encode(), quote(secret, safe="").encode(), quote_plus(secret).encode()}
    for shift in range(3):
        padded = base64.b64encode(b"\0" * shift + raw)
        core = padded[-(-shift * 8 // 6) + (1 if shift else 0) : len(raw) * 8 // 6 - 1]
        found |= {core, core.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def leaks(secret: str, folders: Iterable[Path], more: Iterable[bytes] = ()) -> list[str]:
    """Where it stands: files below `folders`, their names, and `more` (what was sent somewhere)."""
    wanted = forms(secret)
    found = [f"sent: {data[:80]!r}" for data in more if any(form in data for form in wanted)]
    for folder in folders:
        for path in folder.rglob("*"):
            data = bytes(path) + (path.read_bytes() if path.is_file() else b"")
            found += [str(path)] if any(form in data for form in wanted) else []
    return found
