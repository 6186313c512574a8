"""Plain text for pretraining -> ids: a document and the token that ends it, every token learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemotron_recipes.data.encoder import Encoded, Encoder
from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.rows import Row
from nemotron_recipes.errors import Problem, UserError


class DocumentEncoder:
    """Rows with `text`, many at a time. Control tokens in a document stay text. UserError: no token `end`."""

    def __init__(self, encoder: Encoder, end: str, quick: bool = True):
        found = encoder.token_id(end)
        if found is None:
            what = f"data.end_of_document: the tokenizer has no token {end!r}"
            raise UserError(Problem(what, fix="name the token that ends a document for the base model, such as </s>"))
        self.encoder = encoder
        self.quick = quick
        self._end = end
        self._end_id: np.ndarray = np.array([found], dtype=np.int32)

    def reference(self) -> DocumentEncoder:
        """The same without another engine."""
        return DocumentEncoder(self.encoder, self._end, quick=False)

    def documents(self, rows: Sequence[Row]) -> list[Encoded | BadRow]:
        """One result per row, in order."""
        plain = self.encoder.encode_plain([row.text or "" for row in rows], self.quick)
        return [one if isinstance(one, BadRow) else self._ended(one) for one in plain]

    def differs(self, row: Row) -> bool:
        """Whether the chosen engine gives anything else than the reference for this row."""
        ours, theirs = (one.documents([row])[0] for one in (self, self.reference()))
        if isinstance(ours, BadRow) or isinstance(theirs, BadRow):
            return type(ours) is not type(theirs)
        return not np.array_equal(ours.ids, theirs.ids)

    def _ended(self, ids: np.ndarray) -> Encoded:
        ids = np.concatenate([ids, self._end_id])
        return Encoded(ids, np.ones(len(ids), dtype=np.uint8), ((0, len(ids)),))
