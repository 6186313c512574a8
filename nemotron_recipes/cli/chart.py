"""A curve in characters, for terminals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_EIGHTHS = " ▁▂▃▄▅▆▇█"


class Curve:
    """(step, value) pairs of a run of any length, in bounded memory: of many only every 2nd, 4th, ... is kept."""

    def __init__(self, most: int = 2048):
        self.most, self.every, self.seen = most, 1, 0
        self.points: list[tuple[int, float]] = []
        self.last: tuple[int, float] | None = None

    def add(self, step: int, value: float | None) -> None:
        """What is not finite is left out. A step that comes once more (after a resume) replaces what follows."""
        if value is None or not math.isfinite(value):
            return
        if self.last is not None and step <= self.last[0]:
            self.points = [point for point in self.points if point[0] < step]
        self.last = (step, value)
        self.seen += 1
        if self.seen % self.every == 0:
            self.points.append(self.last)
        if len(self.points) > self.most:
            self.points, self.every = self.points[1::2], self.every * 2

    @property
    def values(self) -> list[float]:
        """In order; the newest is always among them."""
        newest = [self.last] if self.last is not None and self.last not in self.points[-1:] else []
        return [value for _, value in [*self.points, *newest]]


def chart(values: Sequence[float], width: int, height: int) -> list[str]:
    """`height` lines of at most `width` characters: bars up to the mean of what falls into each column.

    The greatest and the smallest mean are written at the left. [] without values, or without room.
    """
    labels = 9
    columns = min(len(values), width - labels - 1)
    if columns < 1 or height < 1:
        return []
    edges = [round(len(values) * place / columns) for place in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low
    # The lowest still shows as one eighth.
    levels = [1 + round((mean - low) / span * (height * 8 - 1)) if span else height * 4 for mean in means]
    lines = []
    for row in reversed(range(height)):
        bars = "".join(_EIGHTHS[min(8, max(0, level - row * 8))] for level in levels)
        label = f"{high:.4g}" if row == height - 1 else f"{low:.4g}" if row == 0 else ""
        lines.append(f"{label:>{labels}} {bars}".rstrip())
    return lines
