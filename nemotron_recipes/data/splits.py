"""Which split a row belongs to, and how often it is taken. Both follow from the row's content alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from nemotron_recipes.data.rows import Row
from nemotron_recipes.data.settings import Splits

_SPAN = 2**64


def content_key(row: Row) -> bytes:
    """A digest of the messages for SFT, of the prompt else: rows that share a prompt stay in one split."""
    return digest([row.tools, row.messages or row.prompt])


def digest(value: Any) -> bytes:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).digest()


def split_of(key: bytes, shares: Splits) -> str:
    """The split of a row without a predefined one. A row stays where it is when others come or go."""
    point = _point(key, b"split")
    if point < shares.test:
        return "test"
    if point < shares.test + shares.validation:
        return "validation"
    return "train"


def copies(key: bytes, weight: float) -> int:
    """How often a training row is taken: the whole part of `weight`, and once more for that fraction of rows."""
    whole = int(weight)
    return whole + (_point(key, b"weight") < weight - whole)


def _point(key: bytes, purpose: bytes) -> float:
    """Uniform in [0, 1), independent for each purpose."""
    return int.from_bytes(hashlib.sha256(purpose + key).digest()[:8], "big") / _SPAN
