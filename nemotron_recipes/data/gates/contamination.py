"""Rows that hold what a model will be evaluated on: word n-grams shared with named evaluation files.

As GPT-3's authors did it (arXiv 2005.14165, appendix C): 13 words in lower case without punctuation. An item with fewer
words is looked for whole, down to SHORTEST words; shorter ones would match by chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nemotron_recipes.data.gate_settings import Contamination
from nemotron_recipes.data.gates import Candidate, Drop, Quote, Verdict
from nemotron_recipes.data.gates.simple import Gate
from nemotron_recipes.data.gates.text import lookup, ngram_hashes, texts, word_hashes, words, words_at
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import files_below, path_digest

SHORTEST = 8  # words


@dataclass
class _Index:
    """For each length in words: sorted uint64 hashes and, beside them, the place of each in `places`."""

    hashes: dict[int, np.ndarray] = field(default_factory=dict)
    owners: dict[int, np.ndarray] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)


_LOADED: dict[Any, _Index] = {}  # by key: once per process, and never pickled with the gate


@dataclass(frozen=True)
class ContaminationGate(Gate):
    """Reason: contaminated. `files`: where the references of the settings lie."""

    settings: Contamination
    files: tuple[Path, ...] = ()
    name: ClassVar[str] = "contamination"

    @property
    def key(self) -> Any:
        try:
            digests = [path_digest(str(file)) for file in self.files]
        except OSError as error:
            raise UserError(Problem(f"data.gates.contamination: {error.filename} can't be read")) from None
        return [digests, self.settings.fields, self.settings.ngram]

    def open(self) -> None:
        """UserError: a file can't be read, or holds nothing that can be looked for."""
        if self._place not in _LOADED:
            _LOADED[self._place] = _read(self.files, self.settings)

    def check(self, candidate: Candidate) -> Verdict:
        index = _LOADED[self._place]
        for where, text in texts(candidate.row):
            hashes = word_hashes(words(text))
            for length, known in index.hashes.items():
                grams = ngram_hashes(hashes, length)
                if not len(grams):
                    continue
                at = np.minimum(np.searchsorted(known, grams), len(known) - 1)
                hits = np.flatnonzero(known[at] == grams)
                if len(hits):
                    start = int(hits[0])
                    place = index.places[index.owners[length][at[start]]]
                    said = f"{where} shares {length} words with {place}: "
                    return Drop("contaminated", Quote(said, text, *words_at(text, start, length)))
        return None

    @property
    def _place(self) -> Any:
        return (self.files, tuple(self.settings.fields or ()), self.settings.ngram)


def _read(files: tuple[Path, ...], settings: Contamination) -> _Index:
    index = _Index()
    found: dict[int, list[tuple[np.ndarray, int]]] = {}
    for file in files:
        looked_for = 0
        for place, item in _items(file):
            index.places.append(place)
            for text in _texts(item, settings.fields):
                hashes = word_hashes(words(text))
                length = min(settings.ngram, len(hashes))
                if length >= SHORTEST:
                    looked_for += 1
                    found.setdefault(length, []).append((ngram_hashes(hashes, length), len(index.places) - 1))
        if not looked_for:
            what = f"data.gates.contamination: {file} has no text of {SHORTEST} words or more"
            raise UserError(Problem(what, fix="data.gates.contamination.fields names the fields of its rows"))
    for length, parts in found.items():
        hashes = np.concatenate([grams for grams, _ in parts])
        owners = np.concatenate([np.full(len(grams), owner, dtype=np.int32) for grams, owner in parts])
        order = np.argsort(hashes, kind="stable")
        index.hashes[length], index.owners[length] = hashes[order], owners[order]
    return index


def _items(location: Path) -> Iterator[tuple[str, Any]]:
    """(`file, line`, row) of a .jsonl file or of those in a folder."""
    files = [location]
    if location.is_dir():
        files = [path for path in files_below(location) if path.suffix in (".jsonl", ".ndjson")]
    for path in files:
        try:
            with path.open(encoding="utf-8") as handle:
                for number, line in enumerate(handle, 1):
                    if line.strip():
                        yield f"{path.name}, line {number}", json.loads(line)
        except (OSError, ValueError) as error:
            fix = "evaluation files are JSON Lines: one object per line"
            raise UserError(Problem(f"data.gates.contamination: {path} can't be read: {error}", fix=fix)) from None


def _texts(item: Any, fields: list[str] | None) -> Iterator[str]:
    if fields is not None and isinstance(item, dict):
        item = [lookup(item, name) for name in fields]
    if isinstance(item, str):
        yield item
    elif isinstance(item, (dict, list)):
        for value in item.values() if isinstance(item, dict) else item:
            yield from _texts(value, None)
