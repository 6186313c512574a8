"""One shard from rows to its spool, in one process: read, normalise, place, judge, render, encode, write."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemotron_recipes.data.chat import ChatEncoder
from nemotron_recipes.data.documents import DocumentEncoder
from nemotron_recipes.data.encoder import Encoder, label_mask
from nemotron_recipes.data.gates import EXAMPLES, Candidate, Change, Drop, Gates, Quote, Verdict
from nemotron_recipes.data.gates.pii import redactor
from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.readers import BLANK, Line, read_shard
from nemotron_recipes.data.rows import Row, RowReader
from nemotron_recipes.data.settings import SAMPLED, SPLITS, Settings
from nemotron_recipes.data.shards import Shard, content_digest, file_state
from nemotron_recipes.data.splits import content_key, split_of, weight_point
from nemotron_recipes.data.spool import Spool, SpoolWriter, Tally, is_whole
from nemotron_recipes.errors import Problem, UserError

BLOCK_ROWS = 1024  # encoded at once
BLOCK_BYTES = 2 << 20  # of text, roughly: large rows make smaller blocks
EVERY = 3  # of each third block (so of every shard) the reference encodes one row as well,
STRIDE = 97  # and not always the first one
ANSWERS = {"dpo": ("chosen", "rejected"), "kto": ("completion",), "rl": ()}
GC_OBJECTS = 100_000  # new objects between two looks for cycles
# Reasons that are a choice, not a defect of the row: counted, but not listed as bad.
Rows = ChatEncoder | DocumentEncoder
POLICY = frozenset({"overlong", "nothing_to_train", "sampled_out"})


@dataclass(frozen=True)
class Recipe:
    """What turns rows into spools; picklable."""

    method: str
    settings: Settings
    tokenizer: Path  # folder
    template_source: str
    gates: Gates = field(default_factory=Gates)


@dataclass(frozen=True)
class Done:
    """What a process says of a finished shard. `warning`: the quick way was not exact, the reference did it all."""

    key: str  # the name of its spool
    rows: int
    bad_rows: int
    reused: bool = False  # an earlier run had done it
    seconds: dict[str, float] = field(default_factory=dict)  # of CPU, by row gate
    warning: str = ""


class _Placed(NamedTuple):
    line: int
    candidate: Candidate
    point: float


class ShardEncoder:
    """Made once per process."""

    def __init__(self, recipe: Recipe):
        settings = recipe.settings
        self.recipe = recipe
        self.encoder = Encoder(recipe.tokenizer, recipe.template_source, settings.engine)
        self.rows: ChatEncoder | DocumentEncoder = (
            DocumentEncoder(self.encoder, settings.end_of_document or "")
            if recipe.method == "pretrain"
            else ChatEncoder(self.encoder, settings.thinking)
        )
        thoughts = self.encoder.template.renders_reasoning
        self.readers = [
            RowReader(recipe.method, source.columns or settings.columns, settings.answer_pattern, thoughts)
            for source in settings.sources
        ]
        for gate in recipe.gates.rows:
            gate.open()
        self._redact = redactor(recipe.gates.rows)

    def run(self, shard: Shard, root: Path, base: str) -> Done:
        """See that the shard's spool is below `root`; `base` is what it follows from besides its content.
        UserError: a damaged input; OSError: the disk."""
        try:
            before = file_state(shard)
            content = content_digest(shard)
        except OSError as error:
            raise UserError(Problem(f"{shard.place} can't be read: {error}")) from None
        key = hashlib.sha256(f"{base} {content}".encode()).hexdigest()[:32]
        if is_whole(root / key):
            os.utime(root / key)
            facts = Spool(root / key).facts
            return Done(key, facts["rows"], facts["bad_rows"], reused=True)
        with few_collections():
            done = self._attempt(shard, root, key, self.rows, before)
        if done is None:
            done = self._attempt(shard, root, key, self.rows.reference(), before)
            assert done is not None
            return replace(done, warning=f"{shard.name}: rows differ from the reference, which has done the shard anew")
        return done

    def _attempt(self, shard: Shard, root: Path, key: str, encoder: Rows, before: Any) -> Done | None:
        """None: a sample of the rows shows that the quick way isn't exact."""
        tally = Tally()
        writer = SpoolWriter(root, key, len(self.recipe.gates.corpus))
        try:
            for number, block in enumerate(_blocks(read_shard(shard))):
                writer.lines = block[-1].number
                rows = [line for line in block if line.value is not BLANK]
                if not self._write(rows, shard, writer, tally, encoder, number):
                    return None
            if file_state(shard) != before:  # a spool is what the bytes became that its name speaks of
                raise UserError(Problem(f"changed while it was read: {shard.place}", fix="run again"))
            writer.finish(tally)
            return Done(key, writer.rows, writer.bad_rows, seconds=tally.seconds)
        finally:
            writer.discard()

    def _write(
        self, lines: Sequence[Line], shard: Shard, writer: SpoolWriter, tally: Tally, encoder: Rows, number: int
    ) -> bool:
        """Add the rows of block `number` in order. False: one of them shows that the quick way isn't exact."""
        results: dict[int, BadRow | Drop] = {}
        placed: list[_Placed] = []
        for line in lines:
            one = self._place(line, shard, tally)
            if isinstance(one, _Placed):
                placed.append(one)
            else:
                results[line.number] = one
        rows = [one.candidate.row for one in placed]
        if encoder.quick and rows and number % EVERY == 0 and encoder.differs(rows[number * STRIDE % len(rows)]):
            return False
        if isinstance(encoder, DocumentEncoder):
            encoded = _documents(encoder, rows)
        else:
            method = self.recipe.method
            encoded = _sft(encoder, placed) if method == "sft" else _answers(encoder, method, rows)
        ready = iter(zip(placed, encoded, strict=True))
        gates = self.recipe.gates
        for line in lines:
            if line.number in results:
                _drop(writer, line.number, results[line.number], self._redact)
                continue
            one, what = next(ready)
            if isinstance(what, BadRow):
                _drop(writer, line.number, what, self._redact)
                continue
            sequences, payload, ids = what
            verdict = self._judge_tokens(one.candidate, ids, tally) if gates.rows else None
            if isinstance(verdict, Drop):
                _drop(writer, line.number, verdict, self._redact)
                continue
            signatures = self._signatures(one.candidate, ids, tally) if gates.corpus else []
            length, tokens = _lengths(ids)
            split = SPLITS.index(one.candidate.split)
            writer.keep(line.number, split, one.point, sequences, payload, length, tokens, signatures)
        return True

    def _place(self, line: Line, shard: Shard, tally: Tally) -> _Placed | BadRow | Drop:
        if line.bad is not None:
            return line.bad
        try:
            row = self.readers[shard.source].read(line.value)
        except BadRow as bad:
            return bad
        source = self.recipe.settings.sources[shard.source]
        key = content_key(row)
        split = source.split or split_of(key, self.recipe.settings.splits)
        point = weight_point(key)
        if split == "train" and self.recipe.method in SAMPLED and point >= source.weight:
            return BadRow("sampled_out", "")
        candidate = Candidate(row, line.value, split)
        for gate in self.recipe.gates.rows:
            began = time.process_time()
            verdict = gate.check(candidate)
            tally.seconds[gate.name] = tally.seconds.get(gate.name, 0.0) + time.process_time() - began
            _count(tally, gate.name, verdict, self._redact)
            if isinstance(verdict, Drop):
                return verdict
            if isinstance(verdict, Change):
                candidate = Candidate(verdict.row, line.value, split)
        return _Placed(line.number, candidate, point)

    def _judge_tokens(self, candidate: Candidate, ids: Sequence[np.ndarray], tally: Tally) -> Verdict:
        for gate in self.recipe.gates.rows:
            began = time.process_time()
            verdict = gate.check_tokens(candidate, ids)
            tally.seconds[gate.name] = tally.seconds.get(gate.name, 0.0) + time.process_time() - began
            _count(tally, gate.name, verdict, self._redact)
            if isinstance(verdict, Drop):
                return verdict
        return None

    def _signatures(self, candidate: Candidate, ids: Sequence[np.ndarray], tally: Tally) -> list[bytes]:
        found = []
        for gate in self.recipe.gates.corpus:
            began = time.process_time()
            found.append(gate.signature(candidate, ids))
            tally.seconds[gate.name] = tally.seconds.get(gate.name, 0.0) + time.process_time() - began
        return found


@contextmanager
def few_collections() -> Iterator[None]:
    """Rows leave no cycles behind, but thousands of objects are alive while a block is worked on: looking through them
    for cycles again and again costs more than reading them."""
    before = gc.get_threshold()
    gc.set_threshold(GC_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _sft(chat: ChatEncoder, placed: Sequence[_Placed]) -> list[Any]:
    """Sequences, and of rows held out also the prompt that an evaluation continues."""
    conversations = chat.conversations([one.candidate.row for one in placed])
    prompts = iter(chat.prompts([one.candidate.row for one in placed if one.candidate.split != "train"]))
    results: list[Any] = []
    for one, sequences in zip(placed, conversations, strict=True):
        prompt = next(prompts) if one.candidate.split != "train" else None
        if isinstance(sequences, BadRow) or isinstance(prompt, BadRow):
            results.append(sequences if isinstance(sequences, BadRow) else prompt)
            continue
        labelled = [(sequence.ids, label_mask(sequence.mask)) for sequence in sequences]
        payload = b"" if prompt is None else _held_out(one.candidate.row, prompt)
        results.append((labelled, payload, [sequence.ids for sequence in sequences]))
    return results


def _answers(chat: ChatEncoder, method: str, rows: Sequence[Row]) -> list[Any]:
    """DPO, KTO and RL: messages for people and reward functions, token ids for trainers. They are encoded here, so
    that no trainer has to tokenise text in which a row's control tokens would act."""
    names = ("prompt", *ANSWERS[method])
    encoded: list[Any]
    if len(names) == 1:
        encoded = [one if isinstance(one, BadRow) else [one] for one in chat.prompts(rows)]
    else:
        encoded = list(chat.answers(rows, names[1:]))
    return [
        ids if isinstance(ids, BadRow) else ([], _entry(method, row, dict(zip(names, ids, strict=True))), ids)
        for row, ids in zip(rows, encoded, strict=True)
    ]


def _documents(encoder: DocumentEncoder, rows: Sequence[Row]) -> list[Any]:
    return [
        one if isinstance(one, BadRow) else ([(one.ids, label_mask(one.mask))], b"", [one.ids])
        for one in encoder.documents(rows)
    ]


def _blocks(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Rows to encode at once. A row's result doesn't depend on its block."""
    block: list[Line] = []
    size = 0
    for line in lines:
        block.append(line)
        size += line.size or _text_size(line.value)
        if len(block) >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _text_size(value: Any) -> int:
    """Characters of text in a value, where the reader knows no bytes."""
    size, stack = 0, [value]
    while stack:
        one = stack.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, (dict, list)):
            stack += one.values() if isinstance(one, dict) else one
    return size


def _lengths(ids: Sequence[np.ndarray]) -> tuple[int, int]:
    """(tokens of the prompt and the longest answer, tokens of all)."""
    if len(ids) == 1:
        return len(ids[0]), len(ids[0])
    first, *others = [len(one) for one in ids] or [0]
    return first + max(others, default=0), first + sum(others)


def _drop(writer: SpoolWriter, line: int, why: BadRow | Drop, redact: Callable[[str | Quote], str]) -> None:
    detail = why.detail if isinstance(why, BadRow) and why.reason not in POLICY else None
    writer.drop(line, why.reason, redact(detail) if detail else detail)


def _count(tally: Tally, gate: str, verdict: Verdict, redact: Callable[[str | Quote], str]) -> None:
    if verdict is None:
        return
    counted = tally.counts.setdefault(gate, {}).setdefault(verdict.reason, [0, []])
    counted[0] += 1
    if verdict.example and len(counted[1]) < EXAMPLES:
        counted[1].append(redact(verdict.example))


def _held_out(row: Row, prompt: np.ndarray) -> bytes:
    entry = {"messages": row.messages, "expected_answer": row.expected_answer, "prompt_ids": prompt.tolist()}
    return _json_line(row, entry)


def _entry(method: str, row: Row, ids: dict[str, np.ndarray]) -> bytes:
    entry: dict[str, Any] = {name: getattr(row, name) for name in ids}
    entry |= {f"{name}_ids": values.tolist() for name, values in ids.items()}
    if method == "kto":
        entry["label"] = row.label
    if method == "rl":
        entry |= {"expected_answer": row.expected_answer, "extra": row.extra}
    return _json_line(row, entry)


def _json_line(row: Row, entry: dict[str, Any]) -> bytes:
    if row.tools:
        entry = {**entry, "tools": row.tools}
    return json.dumps(entry, ensure_ascii=True, sort_keys=True).encode("ascii") + b"\n"
