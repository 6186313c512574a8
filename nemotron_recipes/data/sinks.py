"""Where placed rows go: packed sequences for SFT, JSON Lines with token ids for preference data and RL."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from nemotron_recipes.data.chat import ChatEncoder
from nemotron_recipes.data.encoder import Encoded, label_mask
from nemotron_recipes.data.ledger import Account
from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.packed import Spool, write_megatron, write_native
from nemotron_recipes.data.packing import pack
from nemotron_recipes.data.rows import Row
from nemotron_recipes.data.settings import SPLITS, Settings

MEGATRON_NAMES = {"train": "training", "validation": "validation", "test": "test"}
ANSWERS = {"dpo": ("chosen", "rejected"), "kto": ("completion",), "rl": ()}


@dataclass(frozen=True)
class Placed:
    """A good row, its split, and how often it is taken."""

    row: Row
    split: str
    times: int


@dataclass
class SplitFacts:
    """What a split holds."""

    rows: int = 0
    sequences: int = 0
    packs: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0  # tokens of the longest sequence; of preference and RL rows: of prompt and answer together


class Sink(Protocol):
    """Takes rows in order. `splits` is complete after `finish`."""

    splits: dict[str, SplitFacts]

    def add(self, rows: list[Placed], account: Account) -> list[BadRow | None]:
        """Write the rows; for each None, or why it was left out. Counts sequences in `account`."""
        ...

    def finish(self) -> None:
        """Write what needs all rows."""
        ...

    def close(self) -> None:
        """Close every file; also after an error."""
        ...


class RowsFiles:
    """`<split>/rows.jsonl` of some splits."""

    def __init__(self, output: Path, splits: tuple[str, ...]):
        self._files: dict[str, IO[str]] = {}
        for split in splits:
            path = output / split / "rows.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[split] = path.open("w", encoding="utf-8", newline="\n")

    def write(self, one: Placed, entry: dict[str, Any]) -> None:
        if one.row.tools:
            entry = {**entry, "tools": one.row.tools}
        self._files[one.split].write(json.dumps(entry, ensure_ascii=True, sort_keys=True) + "\n")

    def close(self) -> None:
        for handle in self._files.values():
            handle.close()


class PackedSink:
    """SFT. Held-out rows are also kept as rows, with the ids of the prompt that an evaluation continues."""

    def __init__(self, settings: Settings, chat: ChatEncoder, output: Path):
        self.settings = settings
        self.chat = chat
        self.output = output
        self.splits = {name: SplitFacts() for name in SPLITS}
        self._spools = {name: Spool(output / ".spool" / name) for name in SPLITS}
        self._rows = RowsFiles(output, ("validation", "test"))

    def add(self, rows: list[Placed], account: Account) -> list[BadRow | None]:
        conversations = self.chat.conversations([one.row for one in rows])
        prompts = iter(self.chat.prompts([one.row for one in rows if one.split != "train"]))
        results: list[BadRow | None] = []
        for one, sequences in zip(rows, conversations, strict=True):
            prompt = next(prompts) if one.split != "train" else None
            if isinstance(sequences, BadRow):
                results.append(sequences)
            elif isinstance(prompt, BadRow):
                results.append(prompt)
            else:
                results.append(self._add(one, sequences, prompt, account))
        return results

    def finish(self) -> None:
        for split, spool in self._spools.items():
            groups = pack(spool.lengths, self.settings.pack_size)
            # Best-fit orders packs by the length of their first sequence; a batch should be a mixture.
            groups = [groups[i] for i in np.random.Generator(np.random.PCG64(0)).permutation(len(groups))]
            if self.settings.format == "native":
                write_native(self.output / split, spool, groups)
            else:
                write_megatron(self.output / f"{MEGATRON_NAMES[split]}.npy", spool, groups)
            facts = self.splits[split]
            facts.sequences, facts.packs = len(spool.lengths), len(groups)
            facts.tokens, facts.learned_tokens = sum(spool.lengths), spool.learned
            facts.longest = max(spool.lengths, default=0)
        shutil.rmtree(self.output / ".spool")

    def close(self) -> None:
        self._rows.close()
        for spool in self._spools.values():
            spool.close()

    def _add(self, one: Placed, sequences: list[Encoded], prompt: np.ndarray | None, account: Account) -> BadRow | None:
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        lost: Counter[str] = Counter()
        size = self.settings.pack_size
        truncated = 0
        for sequence in sequences:
            overlong = len(sequence.ids) > size
            mask = label_mask(sequence.mask[:size])
            if overlong and (self.settings.overlong == "drop" or not mask.any()):
                lost["overlong"] += 1
            elif not mask.any():
                lost["nothing_to_train"] += 1
            else:
                truncated += overlong
                kept.append((sequence.ids[:size], mask))
        if not kept:
            return BadRow("overlong" if lost["overlong"] else "nothing_to_train", "")
        account.sequences += len(kept) * one.times
        account.sequences_dropped += lost
        account.sequences_truncated += truncated
        self.splits[one.split].rows += 1
        for ids, mask in kept * one.times:
            self._spools[one.split].add(ids, mask)
        if prompt is not None:
            entry = {"messages": one.row.messages, "expected_answer": one.row.expected_answer}
            self._rows.write(one, {**entry, "prompt_ids": prompt.tolist()})
        return None


class RowsSink:
    """DPO, KTO and RL: messages for people and reward functions, token ids for trainers. The ids are encoded here, so
    that no trainer has to tokenise text in which a row's control tokens would act."""

    def __init__(self, method: str, settings: Settings, chat: ChatEncoder, output: Path):
        self.method = method
        self.settings = settings
        self.chat = chat
        self.splits = {name: SplitFacts() for name in SPLITS}
        self._rows = RowsFiles(output, SPLITS)

    def add(self, rows: list[Placed], account: Account) -> list[BadRow | None]:
        names = ("prompt", *ANSWERS[self.method])
        plain = [one.row for one in rows]
        encoded: list[list[np.ndarray] | BadRow]
        if len(names) == 1:
            encoded = [one if isinstance(one, BadRow) else [one] for one in self.chat.prompts(plain)]
        else:
            encoded = self.chat.answers(plain, names[1:])
        return [
            ids if isinstance(ids, BadRow) else self._add(one, dict(zip(names, ids, strict=True)), account)
            for one, ids in zip(rows, encoded, strict=True)
        ]

    def finish(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self._rows.close()

    def _add(self, one: Placed, ids: dict[str, np.ndarray], account: Account) -> BadRow | None:
        length = len(ids["prompt"]) + max((len(answer) for name, answer in ids.items() if name != "prompt"), default=0)
        if length > self.settings.pack_size:
            return BadRow("overlong", "")
        row = one.row
        entry: dict[str, Any] = {name: getattr(row, name) for name in ids}
        entry |= {f"{name}_ids": values.tolist() for name, values in ids.items()}
        if self.method == "kto":
            entry["label"] = row.label
        if self.method == "rl":
            entry |= {"expected_answer": row.expected_answer, "extra": row.extra}
        for _ in range(one.times):
            self._rows.write(one, entry)
        account.sequences += one.times
        facts = self.splits[one.split]
        facts.rows += 1
        facts.sequences += one.times
        facts.tokens += one.times * sum(len(values) for values in ids.values())
        facts.longest = max(facts.longest, length)
        return None
