#!/usr/bin/env python3
"""How well `--smoke 10` projects a whole run: the tiny recipe with a save every few steps, projected and then run.

usage: python bench/smoke.py [--runs N]

Prints a Markdown table. Beside ours stands the projection that leaves saves out, from the same smoke
run: what the middle steps take, times all steps, and what is done once. Run it with the Python of an environment that
trains.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nemotron_recipes.planning.history import pace_of
from nemotron_recipes.rundir import RunDir, read_json

STEPS, SAVES = 120, 3  # a save every third step: about as much of a step's time as on a large cluster
WHOLE = (
    *("nano3", "sft", "-c", "tiny", f"train.train_iters={STEPS}", f"checkpoint.save_interval={SAVES}"),
    *("train.global_batch_size=8", "train.micro_batch_size=8", "evaluation.rows=0"),
)


def nemotron(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NEMOTRON_ENV": ""}
    command = [sys.executable, "-m", "nemotron_recipes", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def newest(folder: Path) -> RunDir:
    return RunDir(max((folder / "nemotron-output" / "runs").iterdir(), key=lambda run: run.stat().st_ctime))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    print("| run | real | projected | of it | without saves | of it |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        nemotron(folder, "nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "400")
        for number in range(1, runs + 1):
            nemotron(folder, *WHOLE, "--smoke", "10")
            pace = pace_of(newest(folder), "sft")
            assert pace is not None
            nemotron(folder, *WHOLE)
            record = read_json(newest(folder).stage("sft").record)
            assert record is not None
            real = record["ended"] - record["started"]
            ours = pace.whole({"steps": STEPS, "save_interval": SAVES, "eval_interval": STEPS})
            bare = pace.fixed_seconds + STEPS * pace.step_seconds
            cells = f"{real:.1f} s | {ours:.1f} s | {ours / real:.2f} | {bare:.1f} s | {bare / real:.2f}"
            print(f"| {number} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
