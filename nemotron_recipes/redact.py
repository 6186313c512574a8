"""Which variables hold secrets, and text without their values. Standard library only."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus

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
    """`text` without these values, however they are written, and without passwords in URLs."""
    for value in values:
        for form in forms(value):
            text = text.replace(form, HIDDEN)
    return _IN_URL.sub(HIDDEN, text)


def forms(value: str) -> list[str]:
    """The texts that give a value away, longest first: plain, and as JSON, URLs and base64 write it."""
    found = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    raw = value.encode("utf-8", "surrogateescape")
    found |= {quote(raw), quote(raw, safe=""), quote_plus(raw)}
    for before in range(3):  # base64 depends on where it begins; the letters at both ends on what stands beside it
        text = base64.b64encode(bytes(before) + raw).decode()
        core = text[(0, 2, 3)[before] : (before + len(raw)) * 8 // 6]
        found |= {core, core.replace("+", "-").replace("/", "_")}
    return sorted(found, key=len, reverse=True)


def holds_a_password(text: str) -> bool:
    """Whether a URL in it has one."""
    return _IN_URL.search(text) is not None
