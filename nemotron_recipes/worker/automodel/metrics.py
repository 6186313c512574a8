"""AutoModel's training.jsonl and validation.jsonl, which lie beside its checkpoints, as lines of metrics.jsonl.

AutoModel writes them in batches of a hundred steps and when it ends, so a curve comes late but whole. Standard library.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.metrics import append, forget_after

_NAMES = {"val_loss": "validation_loss", "tps": "tokens_per_second"}
_LEFT_OUT = ("step", "epoch", "timestamp", "mem", "tps_per_gpu")


class Metrics:
    """Rank 0: `look` takes over what has come since. Steps after `start`, which are done again, are forgotten first."""

    def __init__(self, context: Context, start: int, steps: int):
        self.context, self.steps = context, steps
        # What earlier attempts have written there is in metrics.jsonl already, or is done again.
        self._read = {file: file.stat().st_size for file in self._files()}
        forget_after(context.dir.metrics, start)

    def look(self) -> None:
        rows = sorted((row for file in self._files() for row in self._new(file)), key=lambda row: row["step"])
        append(self.context, rows)

    def _files(self) -> list[Path]:
        root = self.context.dir.checkpoints
        return [root / "training.jsonl", *root.glob("validation*.jsonl")] if (root / "training.jsonl").is_file() else []

    def _new(self, file: Path) -> Iterator[dict[str, Any]]:
        """Whole lines after those that were read before."""
        with open(file, "rb") as source:
            source.seek(self._read.get(file, 0))
            text = source.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read[file] = self._read.get(file, 0) + len(whole)
        for line in whole.splitlines():
            try:
                yield self._row(json.loads(line))
            except (ValueError, KeyError) as error:  # figures for people; they may not end a training
                print(f"warning: a line of {file} can't be read: {error!r}", file=sys.stderr)

    def _row(self, told: dict[str, Any]) -> dict[str, Any]:
        when = datetime.fromisoformat(told["timestamp"].replace("Z", "+00:00")).timestamp()
        row: dict[str, Any] = {"step": told["step"] + 1, "steps": self.steps, "time": round(when, 3)}
        for name, value in told.items():
            if name not in _LEFT_OUT and isinstance(value, (int, float)):
                row[_NAMES.get(name, name)] = value if math.isfinite(value) else None
        return row
