"""Which split a row belongs to, and how often it is taken. Both follow from the row's content alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import orjson

from nemotron_recipes.data.rows import Row
from nemotron_recipes.data.settings import Splits

_SPAN = 2**64


def content_key(row: Row) -> bytes:
    """A digest of the messages for SFT, of the text in pretraining, of the prompt else: rows that share a prompt stay
    in one split."""
    return digest([row.tools, row.messages or row.prompt or row.text])


def digest(value: Any) -> bytes:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    try:
        text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # half a surrogate pair, or an integer of more than 64 bits
        text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    return hashlib.sha256(text).digest()


def split_of(key: bytes, shares: Splits) -> str:
    """The split of a row without a predefined one. A row stays where it is when others come or go."""
    point = _point(key, b"split")
    if point < shares.test:
        return "test"
    if point < shares.test + shares.validation:
        return "validation"
    return "train"


def weight_point(key: bytes) -> float:
    """Where a row stands among all, uniform in [0, 1): with a weight of 0.3 the rows below 0.3 are taken."""
    return _point(key, b"weight")


def copies(points: np.ndarray, weight: float) -> np.ndarray:
    """How often each training row is taken: the whole part of `weight`, and once more for that fraction of rows."""
    whole = int(weight)
    return whole + (points < weight - whole).astype(np.int64)


def _point(key: bytes, purpose: bytes) -> float:
    """Uniform in [0, 1), independent for each purpose."""
    return int.from_bytes(hashlib.sha256(purpose + key).digest()[:8], "big") / _SPAN
