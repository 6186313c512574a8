#!/usr/bin/env python3
"""`nemotron runs list` over a thousand runs that a scheduler carries, beside a folder with ten.

usage: python bench/listing.py [--runs N] [--times N]

Makes N run folders whose jobs have not ended, and stands in for squeue and sacct, which print as many lines as there
are jobs and count how often they are asked. Prints a Markdown table (docs/bench.md): CPU seconds, which other work on
the machine does not stretch, and wall time; medians of runs that take turns. Exits 1 when a list takes a CPU second or
more, or asks more than once. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NEMOTRON = str(Path(sys.executable).parent / "nemotron")
LIMIT = 1.0  # CPU seconds
FAKE = """#!/bin/sh
echo {name} >> "{log}"
exec cat "{answer}"
"""
PROFILE = '[lab]\nexecutor = "slurm"\n'


def main() -> int:
    parser = argparse.ArgumentParser(description="`nemotron runs list` over a thousand runs.")
    parser.add_argument("--runs", type=int, default=1000, help="runs in the folder (default 1000)")
    parser.add_argument("--times", type=int, default=7, help="how often each is measured (default 7)")
    asked = parser.parse_args()
    problems, rows = [], []
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        cases = {
            "10 runs": (Path(few), ("runs", "list")),
            f"{asked.runs} runs, the newest 20": (Path(many), ("runs", "list")),
            f"{asked.runs} runs, all": (Path(many), ("runs", "list", "-n", str(asked.runs))),
        }
        make(Path(few), 10)
        make(Path(many), asked.runs)
        seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in cases}
        for _ in range(asked.times):
            for label, (folder, words) in cases.items():
                (folder / "asked.txt").unlink(missing_ok=True)
                seconds[label].append(measure(folder, words))
                told = (folder / "asked.txt").read_text().split()
                if told != ["squeue", "sacct"]:
                    problems.append(f"{label}: Slurm was asked {len(told)} times: {' '.join(told[:6])}")
    for label, own in seconds.items():
        cpu, wall = (statistics.median(each) for each in zip(*own, strict=True))
        rows.append(f"| {label} | {cpu:.2f} | {wall:.2f} |")
        if cpu >= LIMIT:
            problems.append(f"{label}: {cpu:.2f} CPU s, the limit is {LIMIT:g}")
    print("\n".join(["| `nemotron runs list` over | CPU s | wall s |", "|---|---|---|", *rows]))
    for problem in dict.fromkeys(problems):
        print(f"PROBLEM: {problem}", file=sys.stderr)
    return 1 if problems else 0


def make(folder: Path, runs: int) -> None:
    """`runs` copies of one planned run, each with a job of its own, and commands that know the jobs."""
    (folder / "env.toml").write_text(PROFILE)
    words = ("nano3", "data", "prep", "sft", "-c", "tiny", "--batch", "lab", "--plan-out", "plan.json")
    subprocess.run([NEMOTRON, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    plan = (folder / "plan.json").read_text()
    first = json.loads(plan)["id"]
    for number in range(runs):
        name = f"{first}{number:04d}"
        run = folder / "nemotron-output" / "runs" / name
        run.mkdir(parents=True)
        (run / "plan.json").write_text(plan.replace(first, name))
        native = {"jobs": {"data-prep-sft": str(number + 1)}, "names": {}}
        handle = {"executor": "slurm", "run": name, "run_dir": str(run), "native": native}
        (run / "handle.json").write_text(json.dumps(handle))
        (run / "events.jsonl").write_text('{"time": 0, "event": "submitting", "attempts": {"data-prep-sft": 1}}\n')
    answers = {
        "squeue": "".join(f"{n + 1}|PENDING|0|0|1:00|Priority|N/A||\n" for n in range(runs)),
        "sacct": "".join(f"{n + 1}|PENDING|0:0|None assigned|00:01:00|Priority\n" for n in range(runs)),
    }
    (folder / "bin").mkdir()
    for name, text in answers.items():
        answer, program = folder / f"{name}.txt", folder / "bin" / name
        answer.write_text(text)
        program.write_text(FAKE.format(name=name, log=folder / "asked.txt", answer=answer))
        program.chmod(0o755)


def measure(folder: Path, words: tuple[str, ...]) -> tuple[float, float]:
    """(CPU seconds with the children, wall seconds) of one process."""
    environ = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    began = time.monotonic()
    process = subprocess.Popen([NEMOTRON, *words], cwd=folder, env=environ, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
