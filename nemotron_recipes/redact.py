"""Which variables hold secrets, and text without their values. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

HIDDEN = "[hidden]"
SHORTEST = 8  # characters; shorter values would match by chance
_LIKE_A_SECRET = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|(?:ACCESS|PRIVATE|SECRET)_KEY)$", re.IGNORECASE
)
_IN_URL = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")


def reads_like_a_secret(name: str) -> bool:
    """Whether a variable of that name is taken for a secret although nobody said so: WANDB_API_KEY, HF_TOKEN, ..."""
    return _LIKE_A_SECRET.search(name) is not None


def secret_values(environ: Mapping[str, str], named: Iterable[str] = ()) -> list[str]:
    """Values that must not be written: of `named` variables and of those that read like a secret; longest first."""
    names = {*named, *(name for name in environ if reads_like_a_secret(name))}
    return sorted({environ[name] for name in names if len(environ.get(name, "")) >= SHORTEST}, key=len, reverse=True)


def scrub(text: str, values: Iterable[str]) -> str:
    """`text` without these values and without passwords in URLs."""
    for value in values:
        text = text.replace(value, HIDDEN)
    return _IN_URL.sub(HIDDEN, text)
