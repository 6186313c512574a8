"""Metrics over steps as SVG or PNG, with matplotlib (extra `report`)."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.report.compare import metrics_of

# Keys of metrics.jsonl that come first, in this order; whatever else was logged follows, what never changed at the end.
FIRST = ("loss", "validation_loss", "reward", "rewards/accuracies", "lr", "tokens_per_second")
NO_CURVE = ("step", "steps", "time", "eval_")
MOST = 60  # panels of a picture
LONGEST = 48  # characters of a metric above its panel
MOST_NAMED = 40  # lines that colour and dashes keep apart, and that a legend names
DASHES = ("-", "--", ":", "-.")

Lines = dict[str, dict[str, list[tuple[int, float]]]]  # metric -> run and stage -> points


def draw_metrics(views: Sequence[RunView], form: str = "svg", names: Sequence[str] | None = None) -> bytes:
    """One picture: a panel for each metric, a line for each run and stage. What was no number breaks the line and is
    marked at the bottom. names: only these. UserError: nothing was logged."""
    lines = _lines(views)
    if not lines:
        raise UserError(Problem(f"no metrics were logged by {', '.join(view.id for view in views)}"))
    return _draw({key: lines[key] for key in _ordered(lines) if names is None or key in names}, form)


def metric_names(views: Sequence[RunView]) -> list[str]:
    """What there is to draw, the most telling first."""
    return _ordered(_lines(views))


def _ordered(lines: Lines) -> list[str]:
    def rank(key: str) -> tuple[int, bool, str]:
        values = {value for points in lines[key].values() for _, value in points}
        return (FIRST.index(key) if key in FIRST else len(FIRST), len(values) < 2, key)

    return sorted(lines, key=rank)


def _lines(views: Sequence[RunView]) -> Lines:
    lines: Lines = {}
    for view in views:
        for stage in view.stages:
            label = printable(f"{view.id} {stage.name}")
            for row in metrics_of(view, stage.name):
                for key, value in row.items():
                    if not key.startswith(NO_CURVE) and (value is None or isinstance(value, (int, float))):
                        point = (row["step"], math.nan if value is None else value)  # null: it was no number
                        lines.setdefault(printable(key), {}).setdefault(label, []).append(point)
    return lines


def _draw(panels: Lines, form: str) -> bytes:
    matplotlib, figure_class = drawing()
    left_out = max(0, len(panels) - MOST)
    panels = dict(list(panels.items())[:MOST])
    labels = list(dict.fromkeys(label for series in panels.values() for label in series))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    named = 0.18 * len(labels) if len(labels) <= MOST_NAMED else 0.2
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemotron", "text.parse_math": False}):
        figure = figure_class(figsize=(4.2 * columns, 2.6 * rows + 0.3 + named), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        handles: dict[str, Any] = {}
        for panel, (name, series) in zip(axes, panels.items(), strict=False):
            for label, points in series.items():
                number = labels.index(label)
                look = {"color": f"C{number % 10}", "linestyle": DASHES[number // 10 % len(DASHES)], "linewidth": 1.2}
                steps, values = zip(*points, strict=True)
                marker = "o" if _alone(values) else None
                handles[label] = panel.plot(steps, values, marker=marker, markersize=3, **look)[0]
                broken = [step for step, value in points if not math.isfinite(value)]
                if broken:
                    bottom = {"transform": panel.get_xaxis_transform(), "clip_on": False}
                    panel.plot(broken, [0.0] * len(broken), "x", color="#c62828", markersize=5, **bottom)
            panel.set_title(name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}...", fontsize=9)
            panel.grid(alpha=0.3)
            panel.tick_params(labelsize=7)
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        if len(labels) <= MOST_NAMED:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=7, ncols=1)
        notes = [f"{len(labels)} lines, too many to name"] * (len(labels) > MOST_NAMED)
        notes += [f"{left_out} more metrics are not drawn"] * bool(left_out)
        if notes:
            figure.supxlabel("; ".join(notes), fontsize=7)
        picture = io.BytesIO()
        figure.savefig(picture, format=form, metadata={"Date": None} if form == "svg" else None)
    return picture.getvalue()


def _alone(values: Sequence[float]) -> bool:
    """Whether a line would show nothing: too few numbers, or none beside another."""
    pairs = itertools.pairwise(map(math.isfinite, values))
    return len(values) < 3 or not any(a and b for a, b in pairs)


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
