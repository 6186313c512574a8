"""metrics.jsonl as a picture."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import read_jsonl

# (title, [(key in metrics.jsonl, label)]); a panel without values is left out
PANELS = (
    ("loss", (("loss", "training"), ("validation_loss", "validation"))),
    ("reward", (("reward", "mean of the samples"),)),
    ("preference accuracy", (("rewards/accuracies", "training"),)),
    ("learning rate", (("lr", None),)),
)


def draw_curves(metrics: Path, target: Path, title: str) -> None:
    """Write a PNG with a panel for each kind of value over the steps."""
    lines = list(read_jsonl(metrics))
    panels = []
    for name, series in PANELS:
        found = [(label, [(m["step"], m[key]) for m in lines if m.get(key) is not None]) for key, label in series]
        if any(points for _, points in found):
            panels.append((name, found))
    if not panels:
        return
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    figure.suptitle(title)
    for axes, (name, found) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for label, points in found:
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 3 else None)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if any(label and points for label, points in found):
            axes.legend()
    axes.set_xlabel("step")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_atomic(target, picture.getvalue())
