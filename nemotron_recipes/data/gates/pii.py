"""Personal data and credentials in the texts of a row: report, redact or drop.

Patterns find candidates, and checks that the formats themselves offer thin them out: Luhn's sum and the issuers' ranges
for cards, `ipaddress` for addresses, libphonenumber's plans for phone numbers. What no format gives away (names, postal
addresses) is not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nemotron_recipes.data.gate_settings import PII_KINDS, Pii
from nemotron_recipes.data.gates import Candidate, Change, Drop, Note, Quote, Verdict
from nemotron_recipes.data.gates.simple import Gate
from nemotron_recipes.data.gates.text import replaced, short, texts
from nemotron_recipes.errors import Problem, UserError

Span = tuple[int, int]

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-]|\.\d)")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:)[0-9A-Fa-f:.]{3,45}(?![\w:])")
_IPV6_USERS = ipaddress.ip_network("2000::/3")  # all that is given out (RFC 4291)
_VERSION = re.compile(r"(?:[A-Za-z]/|(?:\b(?:version|release|ver\.?|v\.?|section)|§)[ =:]{0,3})$", re.IGNORECASE)
# Issuers' first digits with the lengths of their numbers: Visa; Mastercard; American Express; Diners Club; Discover,
# UnionPay and JCB. Timestamps and serial numbers have Luhn's sum by accident, one in ten.
_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}"
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"
    r"|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11}"
    r"|(?:6011|64[4-9]\d|65\d\d|62\d\d|352[89]|35[3-8]\d)\d{12,15}"
)
_PHONE = re.compile(r"\d(?:[^\w\n]{0,3}\d){6}")  # seven digits close together: worth a real look
# Formats that issuers document, so that a match is a credential and no accident.
_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]{2,20} ){0,3}PRIVATE KEY-----.{0,16384}?(?:-----END [A-Z0-9 ]{0,80}PRIVATE KEY-----|\Z)"
    r"|(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"  # Amazon
    r"|AIza[\w-]{35}"  # Google
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255}|glpat-[\w-]{20,64}"
    r"|hf_[A-Za-z0-9]{30,64}|nvapi-[\w-]{20,128}|sk-[\w-]{20,256}"
    r"|xox[abeprs]-[A-Za-z0-9-]{10,256}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,512}|[rs]k_live_[A-Za-z0-9]{16,128}"
    r"|eyJ[\w-]{8,2048}\.eyJ[\w-]{8,8192}\.[\w-]{8,2048}"  # JSON web token (RFC 7519)
    r")(?![A-Za-z0-9])",
    re.DOTALL,
)


class PiiGate(Gate):
    """Reasons: one per combination of kinds that a row holds, as pii_email or pii_email_phone."""

    settings: Pii
    name = "pii"

    @property
    def key(self) -> Any:
        """With the version of the numbering plans, where they are asked."""
        return [super().key, _phonenumbers().__version__ if "phone" in self._kinds else ""]

    def open(self) -> None:
        if "phone" in self._kinds:
            _phonenumbers()

    def check(self, candidate: Candidate) -> Verdict:
        counts: Counter[str] = Counter()
        first = ""
        for where, text in texts(candidate.row):
            for kind, _ in self.find(text):
                counts[kind] += 1
                first = first or where
        if not counts:
            return None
        kinds = [kind for kind in PII_KINDS if counts[kind]]
        reason = "pii_" + "_".join(kinds)
        # Never the data themselves: the report goes further than the rows do.
        example = ", ".join(f"{counts[kind]} {kind}" for kind in kinds) + f"; first in {first}"
        if self.settings.action == "drop":
            return Drop(reason, example)
        if self.settings.action == "redact":
            return Change(replaced(candidate.row, self.redact), reason, example)
        return Note(reason, example)

    def redact(self, text: str) -> str:
        """`text` with `[EMAIL]` and the like in place of what was found."""
        return _without(text, self.find(text))

    def find(self, text: str) -> list[tuple[str, Span]]:
        """(kind, span) in order, without overlaps. Where kinds overlap, the one that is checked harder wins."""
        found: list[tuple[str, Span]] = []
        for kind in ("key", "email", "card", "ip", "phone"):
            if kind in self._kinds:
                taken = [span for _, span in found]
                spans = self._phones(text) if kind == "phone" else _FIND[kind](text)
                found += [(kind, span) for span in spans if not any(_overlap(span, other) for other in taken)]
        return sorted(found, key=lambda one: one[1])

    @property
    def _kinds(self) -> tuple[str, ...]:
        return tuple(self.settings.kinds or PII_KINDS)

    def _phones(self, text: str) -> list[Span]:
        if not _PHONE.search(text) or (self.settings.phone_region is None and "+" not in text):
            return []
        phonenumbers = _phonenumbers()
        matches = phonenumbers.PhoneNumberMatcher(text, self.settings.phone_region)
        return [(match.start, match.end) for match in matches]


def redactor(gates: Sequence[Any]) -> Callable[[str | Quote], str]:
    """What takes personal data and credentials out of the examples that any gate quotes in a report: all kinds that
    need no library, and what the PII gate among `gates` looks for."""
    every = [PiiGate(Pii(kinds=["email", "card", "ip", "key"])), *(gate for gate in gates if isinstance(gate, PiiGate))]

    def redact(example: str | Quote) -> str:
        quote = example if isinstance(example, Quote) else Quote("", example)
        found: list[tuple[str, Span]] = []
        for gate in every:
            found += [one for one in gate.find(quote.text) if not any(_overlap(one[1], other) for _, other in found)]
        text = _without(quote.text, sorted(found, key=lambda one: one[1]), quote.start, quote.end)
        return quote.said + short(text) if isinstance(example, Quote) else text

    return redact


def _without(text: str, found: Sequence[tuple[str, Span]], start: int = 0, end: int | None = None) -> str:
    """The piece of `text` from `start` to `end`, with the kind in place of each span that reaches into it."""
    pieces, end = [], len(text) if end is None else end
    for kind, span in found:
        if _overlap(span, (start, end)):
            pieces += [text[start : span[0]], f"[{kind.upper()}]"]
            start = span[1]
    return "".join([*pieces, text[start:end]])


def luhn(digits: str) -> bool:
    """The checksum of card numbers (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _keys(text: str) -> Iterator[Span]:
    return (match.span() for match in _KEY.finditer(text))


def _emails(text: str) -> Iterator[Span]:
    return (match.span() for match in _EMAIL.finditer(text)) if "@" in text else iter(())


def _cards(text: str) -> Iterator[Span]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if digits.isascii() and len(set(digits)) > 1 and _ISSUERS.fullmatch(digits) and luhn(digits):
            yield match.span()


def _addresses(text: str) -> Iterator[Span]:
    """Addresses that are somebody's: private, loopback, multicast and documentation ranges are not, nor is what stands
    as a version, or may be a slice of Python (two numbers with `::`)."""
    for match in _IPV4.finditer(text):
        if not _VERSION.search(text, max(0, match.start() - 12), match.start()):
            yield from _somebodys(match)
    for match in _IPV6.finditer(text):
        if len([part for part in match.group().rstrip(".").split(":") if part]) > 2:
            yield from _somebodys(match)


def _somebodys(match: re.Match[str]) -> Iterator[Span]:
    word = match.group().rstrip(".")
    try:
        address = ipaddress.ip_address(word)
    except ValueError:
        return
    if address.is_global and not address.is_multicast and (address.version == 4 or address in _IPV6_USERS):
        yield match.start(), match.start() + len(word)


_FIND: dict[str, Callable[[str], Iterator[Span]]] = {
    "key": _keys, "email": _emails, "card": _cards, "ip": _addresses
}  # fmt: skip


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _phonenumbers() -> Any:
    try:
        import phonenumbers
    except ImportError:
        fix = "pip install 'nemotron-recipes[gates]', or set data.gates.pii.kinds without phone"
        raise UserError(
            Problem("data.gates.pii: finding phone numbers needs the 'phonenumbers' library", fix=fix)
        ) from None
    return phonenumbers
