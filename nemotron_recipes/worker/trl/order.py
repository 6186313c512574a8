"""The order of the training data: the same for any number of processes and any micro batch."""

from __future__ import annotations

import random


def shuffled_epochs(rows: int, total: int, seed: int) -> list[int]:
    """`total` row numbers: one shuffled pass over all `rows` after another, the last one cut where `total` ends.

    Step k of a training with global batch b uses entries k*b to (k+1)*b, however they are shared out.
    """
    if rows < 1:
        raise ValueError("no rows to put in order")
    order: list[int] = []
    epoch = 0
    while len(order) < total:
        numbers = list(range(rows))
        random.Random(f"{seed}/{epoch}").shuffle(numbers)
        order += numbers[: total - len(order)]
        epoch += 1
    return order
