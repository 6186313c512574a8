"""A data artifact as the trainers need it: packs, and rows with the token ids that data prep wrote.

Nothing is tokenised here: TRL would render rows with the tokenizer's own template, where control tokens inside a user's
text become real ones.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from nemotron_recipes.data.packed import PackedSplit
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import file_digest
from nemotron_recipes.rundir import read_json, read_jsonl
from nemotron_recipes.worker.trl.config import TrlSettings

DATA_METHODS = {"sft": "sft", "dpo": "dpo", "kto": "kto", "grpo": "rl"}


class DataFolder:
    """Prepared data for `method`. UserError: it is for another method or tokenizer, or in another format."""

    def __init__(self, folder: Path, method: str, tokenizer: Path, pack_size: int | None = None):
        self.folder = folder
        wanted = DATA_METHODS[method]
        metadata = read_json(folder / "metadata.json")
        if metadata is None:
            raise _unusable(folder, "is no prepared data: metadata.json is missing", wanted)
        if metadata["method"] != wanted:
            raise _unusable(folder, f"was prepared for {metadata['method']}, not for {wanted}", wanted)
        if metadata["format"] != "native":
            raise _unusable(folder, f"has the format {metadata['format']}: the trl backend reads native", wanted)
        if pack_size is not None and metadata["pack_size"] != pack_size:
            made = metadata["pack_size"]
            raise _unusable(folder, f"was packed to {made} tokens, and data.pack_size is {pack_size}", wanted)
        if metadata["tokenizer"]["digest"] != file_digest(tokenizer / "tokenizer.json"):
            raise _unusable(folder, "was prepared with another tokenizer.json than the model's", wanted)
        self.template = (folder / metadata["chat_template"]["file"]).read_text(encoding="utf-8")

    def packs(self, split: str) -> PackedSplit | list[dict[str, Any]]:
        """SFT: the packs of a split."""
        return PackedSplit(self.folder / split) if (self.folder / split / "input_ids.npy").is_file() else []

    def longest(self, settings: TrlSettings) -> int:
        """Tokens of the longest pack or row in training or validation, a completion that is to be made included.

        UserError: there is none.
        """
        found, splits = 0, ("train", "validation")
        if settings.method == "sft":
            found = max((len(pack["input_ids"]) for split in splits for pack in self.packs(split)), default=0)
        else:
            for row in (row for split in splits for row in self.rows(split)):
                answers = [len(ids) for name, ids in row.items() if name.endswith("_ids") and name != "prompt_ids"]
                found = max(found, len(row["prompt_ids"]) + max(answers, default=0))
        if not found:
            raise UserError(Problem(f"{self.folder} holds nothing to train on", "data.path", "prepare more data"))
        return found + (settings.trainer.get("max_completion_length") or 0)

    def rows(self, split: str, limit: int | None = None) -> list[dict[str, Any]]:
        """The first `limit` rows: messages, and ids as `<column>_ids`. Empty where the split is."""
        return list(islice(read_jsonl(self.folder / split / "rows.jsonl"), limit))


def _unusable(folder: Path, what: str, wanted: str) -> UserError:
    return UserError(
        Problem(f"{folder} {what}", "data.path", f"give data that `data prep {wanted}` made for this model")
    )
