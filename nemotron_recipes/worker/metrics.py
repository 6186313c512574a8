"""metrics.jsonl, for workers: what is done again leaves it, and what a trainer of another project tells joins it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import read_jsonl
from nemotron_recipes.worker.context import Context


def forget_after(metrics: Path, step: int) -> int:
    """Drop the lines of steps that will be done again; all of them when training starts anew.

    Returns the newest step that is left, 0 of none.
    """
    kept = [line for line in read_jsonl(metrics) if line["step"] <= step]
    if metrics.exists():
        write_atomic(metrics, "".join(json.dumps(line) + "\n" for line in kept))
    return max((line["step"] for line in kept), default=0)


def append(context: Context, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows, and keep the newest losses as the results of the stage."""
    rows = list(rows)
    if not rows:
        return
    with open(context.dir.metrics, "a", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        context.results |= {name: row[name] for name in ("loss", "validation_loss") if row.get(name) is not None}
