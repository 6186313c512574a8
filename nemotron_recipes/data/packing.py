"""Best-fit decreasing bin packing, in windows so that memory and order stay local."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

WINDOW = 10_000  # sequences


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
