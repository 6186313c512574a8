"""Rendered conversations -> token ids and the mask of what the model has to write.

A row without control strings is encoded in one piece, so its ids are those of the canonical render. A row with some is
encoded stretch by stretch: the template's control tokens as ids, everything between them as plain text. Which of both
a row is shows in the ids: one control id for each that the template wrote, or more.

Where a tokenizer is byte-level, the place of every token is the sum of the widths before it, so masks of many rows come
from a few array operations, and any engine that only gives ids will do. Other tokenizers are asked for offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from nemotron_recipes.data.engine import PROBES, Engine, Fastokens, Reference, agree, byte_widths
from nemotron_recipes.data.fast_render import fast_renderer
from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.template import NO_TEMPLATE, ChatTemplate, Rendered, text_constants
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import file_digest

LONE_SURROGATE = BadRow("lone_surrogate", "half of a UTF-16 surrogate pair: no valid Unicode")
CONTROL_TEXT = BadRow("control_text", "the tokenizer makes a control token of plain text")
_PROBE = [{"role": "user", "content": "Ab c 12\n"}, {"role": "assistant", "content": "d, e."}]


class Encoded(NamedTuple):
    """`ids` (int32) and `mask` (uint8, 1: a token wholly inside a generation block), equally long."""

    ids: np.ndarray
    mask: np.ndarray
    blocks: tuple[tuple[int, int], ...]  # token range of each generation block


class Encoder:
    """A tokenizer together with a chat template. `digest` identifies the tokenizer.

    `fast_render` is a quicker way to render this template, where there is one; `encode` is as good for its results.
    UserError: no usable tokenizer, one that doesn't belong to the template, or an engine that disagrees.
    """

    def __init__(self, folder: Path, template_source: str, engine: str = "tokenizers"):
        path = folder / "tokenizer.json"
        try:
            tree = orjson.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            fix = "save one with AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
            raise UserError(Problem(f"no usable tokenizer.json in {folder}: {error}", fix=fix)) from None
        self.digest = file_digest(path)
        constants = "\0".join(text_constants(template_source))
        added = tree.get("added_tokens", [])
        control = [token for token in added if token["special"] or token["content"] in constants]
        self.template = ChatTemplate(template_source, tuple(sorted(token["content"] for token in control)))
        self._ids = {token["content"]: token["id"] for token in control}
        tree |= {"truncation": None, "padding": None, "post_processor": None}
        # The flag says nothing but what is switched off in plain text.
        tree = _control_only_special(tree, set(self._ids))
        self._tokenizer = _load(tree, path)
        self.vocabulary_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        size = max([self.vocabulary_size - 1, *self._ids.values()]) + 1
        self._is_control = np.zeros(size, dtype=bool)
        self._is_control[list(self._ids.values())] = True
        self._widths = byte_widths(tree, size)
        self.reference: Engine = Reference(self._tokenizer)
        self.engine = self._engine(engine, tree, path)
        self.fast_render = fast_renderer(template_source, self.template.control) if self._widths is not None else None
        # Tokens that swallow the whitespace beside them, as in Phi-3.
        self._left = {token["content"] for token in control if token.get("lstrip")}
        self._right = {token["content"] for token in control if token.get("rstrip")}
        self._probed = self._probe() if template_source != NO_TEMPLATE else None

    def encode(self, rendered: Sequence[Rendered], quick: bool = True) -> list[Encoded | BadRow | None]:
        """One result per text, in order. None: rendered by `fast_render`, and the reference has to have a look.
        `quick` False: the reference engine and its offsets, whatever else there is."""
        results: list[Encoded | BadRow | None] = [None] * len(rendered)
        whole = []
        for index, one in enumerate(rendered):
            if not _encodable(one.text):
                results[index] = LONE_SURROGATE
            elif not one.quoted:
                whole.append(index)
        texts = [rendered[index] for index in whole]
        by_widths = quick and self._widths is not None
        found = self._by_widths(texts) if by_widths else self._with_offsets(texts)
        for index, encoded in zip(whole, found, strict=True):
            results[index] = encoded
        return [
            self._in_pieces(one, by_widths) if result is None and one.frame is not None else result
            for one, result in zip(rendered, results, strict=True)
        ]

    def encode_plain(self, texts: Sequence[str], quick: bool = True) -> list[np.ndarray | BadRow]:
        """ids (int32) of texts in which no control token acts; one result per text, in order."""
        good = [index for index, text in enumerate(texts) if _encodable(text)]
        results: list[np.ndarray | BadRow] = [LONE_SURROGATE] * len(texts)
        engine = self.engine if quick else self.reference
        ids, bounds = engine.encode([texts[index] for index in good])
        for index, start, end in zip(good, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            found = ids[start:end]
            if self._is_control[found].any():
                found = np.array(self._encode_plain(texts[index]).ids, dtype=np.int32)
            results[index] = CONTROL_TEXT if self._is_control[found].any() else found
        return results

    def token_id(self, token: str) -> int | None:
        """The id of a token, or None."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def _by_widths(self, rendered: Sequence[Rendered]) -> list[Encoded | None]:
        """None for a text whose control tokens or length in bytes don't come out."""
        return self._mark(rendered, *self.engine.encode([one.text for one in rendered]))

    def _mark(self, rendered: Sequence[Rendered], ids: np.ndarray, bounds: np.ndarray) -> list[Encoded | None]:
        """Masks from the widths of the tokens; None as above."""
        assert self._widths is not None
        places: np.ndarray = np.zeros(len(ids) + 1, dtype=np.int64)  # where each token begins, in bytes
        np.cumsum(self._widths[ids], dtype=np.int64, out=places[1:])
        controls = np.diff(np.searchsorted(np.flatnonzero(self._is_control[ids]), bounds)).tolist()
        bases = places[bounds]
        sizes = np.diff(bases).tolist()
        blocks: list[int | None] = []  # how many each row has
        edges: list[tuple[int, int]] = []
        for one, count, size, base in zip(rendered, controls, sizes, bases[:-1].tolist(), strict=True):
            length, spans = _byte_spans(one)
            exact = count == one.controls and size == length
            blocks.append(len(spans) if exact else None)
            if exact:
                edges += [(start + base, end + base) for start, end in spans]
        starts, ends = np.array(edges, dtype=np.int64).reshape(-1, 2).T
        # A token that also covers bytes before the block was not the model's to write.
        firsts = np.searchsorted(places[:-1], starts, side="left")
        lasts = np.maximum(np.searchsorted(places[1:], ends, side="right"), firsts)
        turns = np.concatenate([[0], np.stack([firsts, lasts], axis=1).ravel(), [len(ids)]])
        mask: np.ndarray = np.repeat(np.resize(np.array([0, 1], dtype=np.uint8), len(turns) - 1), np.diff(turns))
        # Each block again, counted from the start of its row; (0, 0) where it holds no whole token.
        begins = np.where(lasts > firsts, bounds[np.searchsorted(bounds, firsts, side="right") - 1], firsts)
        found = list(zip((firsts - begins).tolist(), np.where(lasts > firsts, lasts - begins, 0).tolist(), strict=True))
        results: list[Encoded | None] = []
        row_bounds = bounds.tolist()
        at = 0
        for row, count in enumerate(blocks):
            if count is None:
                results.append(None)
                continue
            begin, end = row_bounds[row], row_bounds[row + 1]
            results.append(Encoded(ids[begin:end], mask[begin:end], tuple(found[at : at + count])))
            at += count
        return results

    def _with_offsets(self, rendered: Sequence[Rendered]) -> list[Encoded | None]:
        encodings = self._tokenizer.encode_batch([one.text for one in rendered], add_special_tokens=False)
        results: list[Encoded | None] = []
        for one, encoding in zip(rendered, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            exact = int(self._is_control[ids].sum()) == one.controls
            results.append(_encoded(ids, encoding.offsets, one) if exact else None)
        return results

    def _encode_plain(self, text: str) -> Any:
        """Text that must not act: exactly the control tokens are switched off for it."""
        self._tokenizer.encode_special_tokens = True
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = False

    def _engine(self, name: str, tree: dict[str, Any], path: Path) -> Engine:
        if name == self.reference.name:
            return self.reference
        if self._widths is None:
            what = f"data.engine={name} is for byte-level BPE that normalises nothing; this tokenizer is something else"
            raise UserError(Problem(what, str(path), "leave data.engine=tokenizers"))
        engine = Fastokens(tree, path)
        if not agree(engine, self.reference, [*PROBES, *(f"a {token}b" for token in self._ids)]):
            what = f"data.engine={name} gives other ids for this tokenizer than the reference"
            raise UserError(Problem(what, str(path), "leave data.engine=tokenizers"))
        return engine

    def _in_pieces(self, rendered: Rendered, by_widths: bool) -> Encoded | BadRow:
        """The template's control tokens by id, the stretches between them as plain text."""
        if not self._pieces_are_exact:
            return BadRow("control_text", "a control token in the content, and this tokenizer can't encode in pieces")
        return (self._pieces_by_widths(rendered) if by_widths else None) or self._pieces(rendered)

    def _pieces_by_widths(self, rendered: Rendered) -> Encoded | BadRow | None:
        """None: the length in bytes doesn't come out."""
        frame = rendered.frame or ()
        text = rendered.text
        ends = [0, *(end for _, end in frame)]
        starts = [*(start for start, _ in frame), len(text)]
        ids, bounds = self.engine.encode([text[a:b] for a, b in zip(ends, starts, strict=True)], plain=True)
        if self._is_control[ids].any():
            return CONTROL_TEXT
        ids = np.insert(ids, bounds[1:-1], [self._ids[text[start:end]] for start, end in frame])
        return self._mark([rendered], ids, np.array([0, len(ids)]))[0]

    def _pieces(self, rendered: Rendered) -> Encoded | BadRow:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        done = 0
        strip_left = False
        for start, end in (*(rendered.frame or ()), (len(rendered.text), len(rendered.text))):
            token = rendered.text[start:end]
            stretch, at = rendered.text[done:start], done
            if strip_left:
                at += len(stretch) - len(stretch.lstrip())
                stretch = stretch.lstrip()
            if token in self._left:
                stretch = stretch.rstrip()
            encoding = self._encode_plain(stretch)
            if self._is_control[encoding.ids].any():
                return CONTROL_TEXT
            ids += encoding.ids
            offsets += [(at + a, at + b) for a, b in encoding.offsets]
            if token:
                ids.append(self._ids[token])
                offsets.append((start, end))
            strip_left = token in self._right
            done = end
        return _encoded(np.array(ids, dtype=np.int32), offsets, rendered)

    def _probe(self) -> Rendered:
        """Check that template and tokenizer belong together; returns a plain question and answer, rendered."""
        try:
            rendered = self.template.render(_PROBE, [], add_generation_prompt=False)
        except BadRow as error:
            what = f"data.chat_template can't render a plain question and answer: {error.detail}"
            raise UserError(Problem(what)) from None
        if len(rendered.generated) != 1:
            what = f"data.chat_template: one assistant turn gives {len(rendered.generated)} generation blocks"
            raise UserError(Problem(what, fix="put exactly one {% generation %} block around each assistant turn"))
        start, end = rendered.generated[0]
        if not any(start <= a and b <= end for a, b in rendered.frame or ()):
            what = "no token of this tokenizer ends a turn of this chat template: a model would never learn to stop"
            fix = "choose data.chat_template and data.tokenizer that belong together, the end of turn inside the block"
            raise UserError(Problem(what, fix=fix))
        return rendered

    @cached_property
    def _pieces_are_exact(self) -> bool:
        """Whether encoding in pieces equals encoding at once."""
        assert self._probed is not None  # without a template nothing is rendered
        pieces = self._pieces(self._probed)
        whole = self._tokenizer.encode(self._probed.text, add_special_tokens=False).ids
        return isinstance(pieces, Encoded) and pieces.ids.tolist() == whole


def keep_blocks(encoded: Encoded, blocks: Sequence[int]) -> Encoded:
    """The same with only these generation blocks in the mask."""
    mask = np.zeros_like(encoded.mask)
    for index in blocks:
        start, end = encoded.blocks[index]
        mask[start:end] = encoded.mask[start:end]
    return encoded._replace(mask=mask)


def label_mask(mask: np.ndarray) -> bytes:
    """Aligned to labels (position i says whether token i+1 counts): shifted left, the last position is 0."""
    return (mask.tobytes()[1:] + b"\0")[: len(mask)]


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _byte_spans(rendered: Rendered) -> tuple[int, Sequence[tuple[int, int]]]:
    """(length, generation blocks) of a text in bytes of UTF-8."""
    text = rendered.text
    if text.isascii():
        return len(text), rendered.generated
    spans = []
    chars = size = 0
    for start, end in rendered.generated:
        first = size + len(text[chars:start].encode("utf-8"))
        size = first + len(text[start:end].encode("utf-8"))
        spans.append((first, size))
        chars = end
    return size + len(text[chars:].encode("utf-8")), spans


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
        return Tokenizer.from_str(orjson.dumps(tree).decode("utf-8"))
    except Exception as error:
        if type(error) is not Exception:  # for every defect of the file the library raises just this
            raise
        raise UserError(Problem(f"{path} is no tokenizer: {error}")) from None


def _control_only_special(tree: dict[str, Any], control: set[str]) -> dict[str, Any]:
    """Exactly the control tokens flagged special, so that `encode_special_tokens` switches just these off."""
    tokens = [{**token, "special": token["content"] in control} for token in tree.get("added_tokens", [])]
    return {**tree, "added_tokens": tokens}
