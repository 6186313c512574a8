"""A row of prepared data as a page, with what is learned highlighted."""

from __future__ import annotations

import html

from nemotron_recipes.data.show import Shown
from nemotron_recipes.errors import printable
from nemotron_recipes.report.html import page

_STYLE = "<style>pre { white-space: pre-wrap; overflow-wrap: anywhere; } mark { background: #c9f0d0; }</style>"


def row_page(name: str, shown: Shown) -> str:
    """Self-contained. What the row holds is text, never markup."""
    facts = "".join(f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in shown.facts.items())
    parts = [_STYLE, f"<p>Row {shown.number} of {shown.rows} in {_text(shown.split)}. Learned tokens are "
             f"<mark>marked</mark>.</p><table>{facts}</table>"]  # fmt: skip
    for part in shown.parts:
        pieces = (
            f'<mark title="{one.tokens} tokens">{_text(one.text)}</mark>' if one.learned else _text(one.text)
            for one in part.pieces
        )
        parts.append(f"<h2>{_text(part.title)}</h2><pre>{''.join(pieces)}</pre>")
    return page(name, parts)


def _text(value: str) -> str:
    return html.escape(printable(value))
