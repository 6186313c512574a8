"""Best-fit decreasing bin packing, in windows so that memory and order stay local."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 10_000  # sequences


@dataclass(frozen=True)
class Packing:
    """Which sequences share a pack. Pack i holds `sequences[offsets[i]:offsets[i + 1]]`, `tokens[i]` in all."""

    sequences: np.ndarray  # int64: indices, pack after pack
    offsets: np.ndarray  # int64 [packs + 1]
    tokens: np.ndarray  # int64 [packs]

    def __len__(self) -> int:
        return len(self.tokens)


def packing(lengths: np.ndarray, capacity: int, window: int = WINDOW) -> Packing:
    """Every sequence in one pack, no pack longer than `capacity`; packs in the order of their windows."""
    sequences, counts = array("q"), array("q")
    for start in range(0, len(lengths), window):
        for group in pack(lengths[start : start + window].tolist(), capacity, window):
            sequences.extend(start + index for index in group)
            counts.append(len(group))
    order = np.array(sequences, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))]).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
    return Packing(order, offsets, np.diff(ends[offsets]))


def pack(lengths: Sequence[int], capacity: int, window: int = WINDOW) -> list[list[int]]:
    """Indices of the sequences of each pack; every index comes once and no pack is longer than `capacity`.

    Within a window the longest sequence goes first, into the fullest pack that still has room. Cost per sequence is
    a binary search among the distinct remaining capacities, of which there are at most `capacity`.
    """
    packs: list[list[int]] = []
    for start in range(0, len(lengths), window):
        packs += _pack_window(lengths, range(start, min(start + window, len(lengths))), capacity)
    return packs


def _pack_window(lengths: Sequence[int], indices: range, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[int] = []  # distinct remaining capacities, ascending
    by_room: dict[int, list[int]] = {}  # remaining capacity -> packs that have it
    for index in sorted(indices, key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ValueError(f"sequence {index} has {length} tokens; a pack holds {capacity}")
        at = bisect_left(room, length)
        if at == len(room):
            left = capacity - length
            number = len(packs)
            packs.append([index])
        else:
            fitting = room[at]
            number = by_room[fitting].pop()
            if not by_room[fitting]:
                del by_room[fitting], room[at]
            packs[number].append(index)
            left = fitting - length
        if left:
            if left not in by_room:
                by_room[left] = []
                insort(room, left)
            by_room[left].append(number)
    return packs
