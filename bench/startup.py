#!/usr/bin/env python3
"""CPU seconds of the commands that must start fast, as whole processes with their children.

usage: python bench/startup.py [--runs N]

Prints a Markdown table (docs/bench.md). Exits 1 when a command is above its limit, fails, or imports torch or nemo_run.
Run it with the Python of the environment that holds the `nemotron` command; every figure is a median of N runs that
take turns, so that a busy machine slows all rows alike, and the ratios against a bare Python and `import hydra` carry
over to other machines. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FORBIDDEN = ("torch", "nemo_run", "transformers", "leptonai")
NEMOTRON = str(Path(sys.executable).parent / "nemotron")


@dataclass(frozen=True)
class Command:
    label: str
    argv: tuple[str, ...]
    limit: float | None = None  # CPU seconds


COMMANDS = (
    Command("`python -c pass`", (sys.executable, "-c", "pass")),
    Command("`python -c 'import hydra'`", (sys.executable, "-c", "import hydra")),
    Command("`nemotron --help`", (NEMOTRON, "--help"), 0.25),
    Command("`nemotron nano3 sft --help`", (NEMOTRON, "nano3", "sft", "--help"), 0.4),
    Command("`nemotron runs list`", (NEMOTRON, "runs", "list"), 0.4),
    Command(
        "`nemotron nano3 data prep sft -c tiny --dry-run`",
        (NEMOTRON, "nano3", "data", "prep", "sft", "-c", "tiny", "--dry-run"),
        0.9,
    ),
    Command("`nemotron nano3 pipe -c tiny --dry-run`", (NEMOTRON, "nano3", "pipe", "-c", "tiny", "--dry-run"), 0.9),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU seconds of the commands that must start fast.")
    parser.add_argument("--runs", type=int, default=7, help="runs per command (default 7)")
    runs = parser.parse_args().runs
    if not Path(NEMOTRON).exists():
        print(f"error: no `nemotron` beside {sys.executable}: install the package there first", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        problems = [problem for command in COMMANDS if command.limit for problem in check_imports(command, folder)]
        seconds = measure(COMMANDS, runs, folder)
        left = os.listdir(folder)
    if left:
        problems.append(f"a dry run left files: {', '.join(left)}")
    print(table(seconds, runs))
    for command in COMMANDS:
        if command.limit is not None and statistics.median(seconds[command.label]) > command.limit:
            problems.append(f"{command.label} is above its limit of {command.limit} CPU s")
    for problem in problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    return 1 if problems else 0


def check_imports(command: Command, folder: str) -> list[str]:
    """One run with PYTHONPROFILEIMPORTTIME: what it and its children import. Warms the caches as well."""
    done = subprocess.run(
        command.argv,
        cwd=folder,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    imported = set(re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)", done.stderr, re.MULTILINE))
    problems = [f"{command.label} imports {name}" for name in FORBIDDEN if name in imported]
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if not line.startswith("import time:")][-5:]
        problems.append(f"{command.label} ended with {done.returncode}: {' / '.join(last)}")
    elif "nemotron_recipes" not in imported:
        problems.append(f"{command.label}: the import profile does not show nemotron_recipes, so it proves nothing")
    return problems


def measure(commands: tuple[Command, ...], runs: int, folder: str) -> dict[str, list[float]]:
    """User and system seconds of each run, by label."""
    seconds: dict[str, list[float]] = {command.label: [] for command in commands}
    for _ in range(runs):
        for command in commands:
            seconds[command.label].append(cpu_seconds(command.argv, folder))
    return seconds


def cpu_seconds(argv: tuple[str, ...], folder: str) -> float:
    """Of one whole process: wait4 counts the children that it waited for."""
    process = subprocess.Popen(
        argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for a process that is gone
    return usage.ru_utime + usage.ru_stime


def table(seconds: dict[str, list[float]], runs: int) -> str:
    bare, hydra = (statistics.median(seconds[command.label]) for command in COMMANDS[:2])
    lines = [
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores; "
        f"median of {runs} runs.",
        "",
        "| command | CPU s | min to max | × bare Python | × `import hydra` | limit |",
        "|---|---|---|---|---|---|",
    ]
    for command in COMMANDS:
        own = seconds[command.label]
        middle = statistics.median(own)
        lines.append(
            f"| {command.label} | {middle:.3f} | {min(own):.3f} to {max(own):.3f} | {middle / bare:.1f} "
            f"| {middle / hydra:.1f} | {command.limit if command.limit is not None else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
