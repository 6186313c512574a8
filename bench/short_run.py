#!/usr/bin/env python3
"""Wall seconds of `nemotron nano3 data prep sft` over a few hundred rows, from the command to its end, part by part.

usage: python bench/short_run.py [--rows N] [--runs R] [--tokenizer FOLDER] [--folder FOLDER]

Rows and tokenizer as in bench/data_prep.py, whose --folder it shares. Nothing is reused between the runs but the files
that the system keeps in memory, which one run before the first warms. Prints a Markdown table (docs/bench.md).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from data_prep import train_tokenizer, write_rows

PARTS = {
    "the command starts, plans, and writes the run's folder": "submitted",
    "the run's driver starts": "driver-started",
    "the stage's process is started": "stage-started",
    "the stage, while NeMo-Run is imported beside it": "finished",
    "its end is noticed and summed up": "end",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Wall seconds of a short data preparation, part by part.")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "nemotron-bench-data")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows, many = options.folder / f"rows-{options.rows}.jsonl", options.folder / "rows-10000.jsonl"
    tokenizer = options.tokenizer or options.folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        if not many.exists():
            write_rows(many, 10_000)
        train_tokenizer(many, tokenizer)
    if not rows.exists():
        write_rows(rows, options.rows)
    found = [measured(rows, tokenizer) for _ in range(options.runs + 1)][1:]
    print(f"\n| {options.rows} rows, median of {options.runs} | wall s |\n|---|---|")
    for (_, begin), (name, end) in pairwise([("", "start"), *PARTS.items()]):
        print(f"| {name} | {statistics.median(times[end] - times[begin] for times in found):.2f} |")
    walls = [times["end"] - times["start"] for times in found]
    print(f"| all of it | {statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f}) |")
    print(f"\nCPU seconds of all processes: {statistics.median(times['cpu'] for times in found):.2f}")
    return 0


def measured(rows: Path, tokenizer: Path) -> dict[str, float]:
    """When each part ended, in seconds since the epoch; and the CPU seconds of all processes."""
    words = [f"data.sources=[{{path: {rows}}}]", f"data.tokenizer={tokenizer}"]
    command = [sys.executable, "-m", "nemotron_recipes", "nano3", "data", "prep", "sft", *words]
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        end, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(f"it failed:\n{done.stderr}")
        (events,) = Path(folder).glob("nemotron-output/runs/*/events.jsonl")
        told = [json.loads(line) for line in events.read_text().splitlines()]
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"start": start, **{entry["event"]: entry["time"] for entry in told}, "end": end, "cpu": cpu}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
