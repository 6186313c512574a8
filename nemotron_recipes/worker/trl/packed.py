"""Packs -> batches of single conversations.

Mamba layers carry their state along the whole row, and without the CUDA kernels nothing resets it where a conversation
of a pack ends. So a pack is taken apart: each conversation becomes a row of its own, padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

IGNORED = -100  # the label of a position that isn't trained, as in torch's cross_entropy


def conversations(pack: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, labels) of each conversation; labels are aligned to input_ids, as Transformers expects them.

    `loss_mask` is aligned to labels: position t is 1 when token t+1 is trained. Transformers shifts by itself, so the
    mask moves one to the right again; the first token of a conversation is never trained.
    """
    ids, mask = np.asarray(pack["input_ids"]), np.asarray(pack["loss_mask"]).astype(bool)
    starts = [int(start) for start in pack["seq_start_id"]]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        trained: np.ndarray = np.append(False, mask[start : end - 1])
        yield ids[start:end], np.where(trained, ids[start:end], IGNORED)


class Packs(Protocol):
    """Packs by number."""

    def __getitem__(self, number: int, /) -> dict[str, Any]: ...


class PackCollator:
    """Rows `{"index": n}` -> one batch of the conversations of those packs."""

    def __init__(self, packs: Packs, pad_token_id: int):
        self.packs = packs
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        """int64 tensors input_ids, attention_mask, labels of shape (conversations, longest)."""
        import torch

        parts = [part for row in rows for part in conversations(self.packs[row["index"]])]
        shape = (len(parts), max(len(ids) for ids, _ in parts))
        input_ids: np.ndarray = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels: np.ndarray = np.full(shape, IGNORED, dtype=np.int64)
        attention_mask: np.ndarray = np.zeros(shape, dtype=np.int64)
        for row, (ids, wanted) in enumerate(parts):
            input_ids[row, : len(ids)] = ids
            labels[row, : len(ids)] = wanted
            attention_mask[row, : len(ids)] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in batch.items()}
