"""Rendered conversations -> token ids and the mask of what the model has to write.

A row without control strings is encoded in one piece, so its ids are those of the canonical render. A row with some is
encoded stretch by stretch: the template's control tokens as ids, everything between them as plain text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.template import ChatTemplate, Rendered, text_constants
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import file_digest

_PROBE = [{"role": "user", "content": "Ab c 12\n"}, {"role": "assistant", "content": "d, e."}]


@dataclass(frozen=True)
class Encoded:
    """`ids` (int32) and `mask` (uint8, 1: a token wholly inside a generation block), equally long."""

    ids: np.ndarray
    mask: np.ndarray
    blocks: tuple[tuple[int, int], ...]  # token range of each generation block


class Encoder:
    """A tokenizer together with a chat template. `digest` identifies the tokenizer."""

    def __init__(self, folder: Path, template_source: str):
        path = folder / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            tree = json.loads(text)
        except (OSError, ValueError) as error:
            fix = "save one with AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
            raise UserError(Problem(f"no usable tokenizer.json in {folder}: {error}", fix=fix)) from None
        self.digest = file_digest(path)
        constants = "\0".join(text_constants(template_source))
        added = tree.get("added_tokens", [])
        control = [token for token in added if token["special"] or token["content"] in constants]
        self.template = ChatTemplate(template_source, tuple(sorted(token["content"] for token in control)))
        self._ids = {token["content"]: token["id"] for token in control}
        self._tokenizer = _load(tree, path)
        self._plain = _load(_control_only_special(tree, set(self._ids)), path)
        self._plain.encode_special_tokens = True
        self.vocabulary_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._is_control = np.zeros(max([self.vocabulary_size - 1, *self._ids.values()]) + 1, dtype=bool)
        self._is_control[list(self._ids.values())] = True
        # Tokens that swallow the whitespace beside them, as in Phi-3.
        self._left = {token["content"] for token in control if token.get("lstrip")}
        self._right = {token["content"] for token in control if token.get("rstrip")}
        self._pieces_are_exact = self._probe()

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded | BadRow]:
        """One result per text, in order."""
        results: list[Encoded | BadRow | None] = [None] * len(rendered)
        for index, one in enumerate(rendered):
            try:
                one.text.encode("utf-8")
            except UnicodeEncodeError:
                results[index] = BadRow("lone_surrogate", "half of a UTF-16 surrogate pair: no valid Unicode")
        whole = [index for index, one in enumerate(rendered) if results[index] is None and not one.quoted]
        encodings = self._tokenizer.encode_batch([rendered[i].text for i in whole], add_special_tokens=False)
        for index, encoding in zip(whole, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            if int(self._is_control[ids].sum()) == len(rendered[index].frame):
                results[index] = _encoded(ids, encoding.offsets, rendered[index])
        return [self._in_pieces(rendered[index]) if one is None else one for index, one in enumerate(results)]

    def _in_pieces(self, rendered: Rendered) -> Encoded | BadRow:
        """The template's control tokens by id, the stretches between them as plain text."""
        if not self._pieces_are_exact:
            return BadRow("control_text", "a control token in the content, and this tokenizer can't encode in pieces")
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        done = 0
        strip_left = False
        for start, end in (*rendered.frame, (len(rendered.text), len(rendered.text))):
            token = rendered.text[start:end]
            stretch, at = rendered.text[done:start], done
            if strip_left:
                at += len(stretch) - len(stretch.lstrip())
                stretch = stretch.lstrip()
            if token in self._left:
                stretch = stretch.rstrip()
            encoding = self._plain.encode(stretch, add_special_tokens=False)
            if self._is_control[encoding.ids].any():
                return BadRow("control_text", "the tokenizer makes a control token of plain text")
            ids += encoding.ids
            offsets += [(at + a, at + b) for a, b in encoding.offsets]
            if token:
                ids.append(self._ids[token])
                offsets.append((start, end))
            strip_left = token in self._right
            done = end
        return _encoded(np.array(ids, dtype=np.int32), offsets, rendered)

    def _probe(self) -> bool:
        """Check that template and tokenizer belong together; say whether encoding in pieces equals encoding at once."""
        try:
            rendered = self.template.render(_PROBE, [], add_generation_prompt=False)
        except BadRow as error:
            what = f"data.chat_template can't render a plain question and answer: {error.detail}"
            raise UserError(Problem(what)) from None
        if len(rendered.generated) != 1:
            what = f"data.chat_template: one assistant turn gives {len(rendered.generated)} generation blocks"
            raise UserError(Problem(what, fix="put exactly one {% generation %} block around each assistant turn"))
        start, end = rendered.generated[0]
        if not any(start <= a and b <= end for a, b in rendered.frame):
            what = "no token of this tokenizer ends a turn of this chat template: a model would never learn to stop"
            fix = "choose data.chat_template and data.tokenizer that belong together, the end of turn inside the block"
            raise UserError(Problem(what, fix=fix))
        self._pieces_are_exact = True
        pieces = self._in_pieces(rendered)
        whole = self._tokenizer.encode(rendered.text, add_special_tokens=False).ids
        return isinstance(pieces, Encoded) and pieces.ids.tolist() == whole


def keep_blocks(encoded: Encoded, blocks: Sequence[int]) -> Encoded:
    """The same with only these generation blocks in the mask."""
    mask = np.zeros_like(encoded.mask)
    for index in blocks:
        start, end = encoded.blocks[index]
        mask[start:end] = encoded.mask[start:end]
    return replace(encoded, mask=mask)


def label_mask(mask: np.ndarray) -> np.ndarray:
    """Aligned to labels (position i says whether token i+1 counts): shifted left, the last position is 0."""
    return np.append(mask[1:], np.uint8(0)).astype(np.uint8)


def _encoded(ids: np.ndarray, offsets: list[tuple[int, int]], rendered: Rendered) -> Encoded:
    mask: np.ndarray = np.zeros(len(ids), dtype=np.uint8)
    spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    blocks = []
    for start, end in rendered.generated:
        # A token that also covers characters before the block was not the model's to write.
        inside = np.flatnonzero((spans[:, 0] >= start) & (spans[:, 1] <= end))
        mask[inside] = 1
        blocks.append((int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0))
    return Encoded(ids, mask, tuple(blocks))


def _load(tree: dict[str, Any], path: Path) -> Any:
    """A `tokenizers.Tokenizer` that adds, cuts and pads nothing, and whose offsets include leading spaces."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps({**tree, "truncation": None, "padding": None, "post_processor": None}))
    except Exception as error:
        if type(error) is not Exception:  # for every defect of the file the library raises just this
            raise
        raise UserError(Problem(f"{path} is no tokenizer: {error}")) from None


def _control_only_special(tree: dict[str, Any], control: set[str]) -> dict[str, Any]:
    """Exactly the control tokens flagged special, so that `encode_special_tokens` switches just these off."""
    tokens = [{**token, "special": token["content"] in control} for token in tree.get("added_tokens", [])]
    return {**tree, "added_tokens": tokens}
