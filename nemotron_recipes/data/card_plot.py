"""The histograms of a data card, drawn with Pillow: a training library's plotting would double the start-up time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

COLOURS = {"train": "#1558b0", "validation": "#e07b00", "test": "#1a7f37"}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 240, 70, 34, 44
_INK, _FAINT = "#333333", "#dddddd"


def draw(panels: Mapping[str, Mapping[str, Sequence[int]]], width: float) -> bytes:
    """A PNG with one panel per title: for each split the counts of equal bins, `width` tokens wide. The scale is that
    of the counts' square roots, so that small splits can be seen beside large ones."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (_WIDTH, _HEIGHT * len(panels)), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    for number, (title, splits) in enumerate(panels.items()):
        base = _HEIGHT * number
        floor = base + _HEIGHT - _BOTTOM
        room = floor - base - _TOP
        highest = max((max(counts, default=0) for counts in splits.values()), default=0) or 1
        pen.text((_LEFT, base + 8), title, fill=_INK, font=font)
        for share in (0.0, 0.25, 1.0):
            y = floor - room * share**0.5
            pen.line([(_LEFT, y), (_WIDTH - 16, y)], fill=_FAINT)
            pen.text((_LEFT - 8, y), short(round(highest * share)), fill=_INK, font=font, anchor="rm")
        bins = max(map(len, splits.values()))
        step = (_WIDTH - 16 - _LEFT) / bins
        for place, (split, counts) in enumerate(splits.items()):
            bar = step / (len(splits) + 0.5)
            for at, count in enumerate(counts):
                if count:
                    x = _LEFT + at * step + place * bar
                    top = min(floor - room * (count / highest) ** 0.5, floor - 1)
                    pen.rectangle([(x, top), (x + max(bar - 1, 1), floor)], fill=COLOURS[split])
            pen.text((_WIDTH - 16 - 90 * (len(splits) - place), base + 8), split, fill=COLOURS[split], font=font)
        for at in range(0, bins + 1, max(1, bins // 8)):
            pen.text((_LEFT + at * step, floor + 6), short(round(at * width)), fill=_INK, font=font, anchor="mt")
        pen.text((_LEFT, floor + 24), "counts: square-root scale", fill=_INK, font=font, anchor="lt")
        pen.text((_WIDTH - 16, floor + 24), "tokens of a sequence", fill=_INK, font=font, anchor="rt")
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=False)
    return stream.getvalue()


def short(count: int) -> str:
    """A number in four characters or so."""
    for unit in ("", "k", "M", "G"):
        if count < 10_000 or unit == "G":
            return f"{count}{unit}"
        count = round(count / 1000)
    return str(count)
