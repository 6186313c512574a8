"""Metrics over steps as SVG or PNG, with matplotlib (extra `report`)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.report.compare import metrics_of

# Keys of metrics.jsonl that get a panel of their own, in this order; whatever else was logged follows.
FIRST = ("loss", "validation_loss", "reward", "rewards/accuracies", "lr", "tokens_per_second")
NO_CURVE = ("step", "steps", "time", "eval_")
MOST = 9  # panels


def draw_metrics(views: Sequence[RunView], form: str = "svg") -> bytes:
    """One picture: a panel for each metric, a line for each run and stage. UserError: nothing was logged."""
    lines = _lines(views)
    if not lines:
        raise UserError(Problem(f"no metrics were logged by {', '.join(view.id for view in views)}"))
    order = sorted(lines, key=lambda key: (FIRST.index(key) if key in FIRST else len(FIRST), key))[:MOST]
    return _draw({key: lines[key] for key in order}, form)


def has_metrics(views: Sequence[RunView]) -> bool:
    """Whether there is anything to draw."""
    return bool(_lines(views))


def _lines(views: Sequence[RunView]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """metric -> run and stage -> points"""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for view in views:
        for stage in view.stages:
            label = printable(f"{view.id} {stage.name}")
            for row in metrics_of(view, stage.name):
                for key, value in row.items():
                    if not key.startswith(NO_CURVE) and isinstance(value, (int, float)):
                        lines.setdefault(printable(key), {}).setdefault(label, []).append((row["step"], value))
    return lines


def _draw(panels: dict[str, dict[str, list[tuple[int, float]]]], form: str) -> bytes:
    matplotlib, figure_class = drawing()
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemotron", "text.parse_math": False}):
        figure = figure_class(figsize=(4.2 * columns, 2.8 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        handles: dict[str, Any] = {}
        for panel, (name, series) in zip(axes, panels.items(), strict=False):
            for label, points in series.items():
                colour = f"C{list(handles).index(label) % 10}" if label in handles else f"C{len(handles) % 10}"
                marker = "o" if len(points) < 3 else None
                handles[label] = panel.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.2)[0]
            panel.set_title(name, fontsize=9)
            panel.grid(alpha=0.3)
            panel.tick_params(labelsize=7)
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=7, ncols=1)
        picture = io.BytesIO()
        figure.savefig(picture, format=form, metadata={"Date": None} if form == "svg" else None)
    return picture.getvalue()


def drawing() -> Any:
    """(matplotlib, its Figure). UserError: it isn't installed."""
    # Text stays text in an SVG: the reader's own fonts show what matplotlib's lacks.
    warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        fix = "pip install 'nemotron-recipes[report]'"
        raise UserError(Problem("drawing needs the package 'matplotlib'", fix=fix)) from None
    return matplotlib, Figure
