#!/usr/bin/env python3
"""`nemotron artifacts list` and `nemotron lineage` over a store with 10,000 versions.

usage: python bench/store.py [--versions N] [--times N]

Makes three stores: N versions of N names, N versions of one name, and a chain of N in which each was made from the one
before. Prints a Markdown table (docs/bench.md): wall and CPU seconds of the whole command, medians. Exits 1 when one
takes a second or more.
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

from nemotron_recipes.artifacts.store import KEYS
from nemotron_recipes.seals import SEAL, digest

NEMOTRON = [sys.executable, "-m", "nemotron_recipes"]
LIMIT = 1.0  # seconds of wall time
CASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("names", ("artifacts", "list")),
    ("names", ("artifacts", "list", "--json")),
    ("versions", ("artifacts", "list")),
    ("chain", ("lineage", "model")),
    ("chain", ("lineage", "model", "--json")),
)
WORDS = {"names": "as many names", "versions": "one name", "chain": "each made from the one before"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Commands over a store with many versions.")
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=7, help="how often each is measured (default 7)")
    asked = parser.parse_args()
    seconds: dict[tuple[str, tuple[str, ...]], list[tuple[float, float]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for kind in WORDS:
            make(Path(folder) / kind, kind, asked.versions)
        for _ in range(asked.times):
            for kind, words in CASES:
                seconds[kind, words].append(measure(Path(folder) / kind, words))
    rows, slow = [], []
    for (kind, words), own in seconds.items():
        wall, cpu = (statistics.median(each) for each in zip(*own, strict=True))
        rows.append(f"| `nemotron {' '.join(words)}` | {WORDS[kind]} | {wall:.2f} | {cpu:.2f} |")
        slow += [f"{' '.join(words)}: {wall:.2f} s"] if wall >= LIMIT else []
    print("\n".join([f"| {asked.versions:,} versions | | wall s | CPU s |", "|---|---|---|---|", *rows]))
    for each in slow:
        print(f"PROBLEM: {each}, the limit is {LIMIT:g}", file=sys.stderr)
    return 1 if slow else 0


def make(folder: Path, kind: str, versions: int) -> None:
    """A store as commits would leave it, without their care for power cuts."""
    producer = {"fingerprint": "f" * 71, "run": "nano3-sft-2026", "stage": "sft", "slot": "model", "attempt": 1}
    producer["config"] = {"train": {"train_iters": 100}, "optimizer": {"lr": 1e-5}}
    for number in range(1, versions + 1):
        name, version = (f"model-{number}", 1) if kind == "names" else ("model", number)
        before = {"input": "model.path", "source": "store", "kind": "model", "name": name, "version": version - 1}
        before |= {"uri": "", "digest": sha(number - 1), "revision": None, "producer": None}
        tree = {
            "name": name,
            "kind": "model",
            "version": version,
            "digest": sha(number),
            "size": 1,
            "files": 1,
            "created": float(number),
            "producer": producer,
            "parents": [before] if kind == "chain" and number > 1 else [],
            "metadata": {"trained_with": "torch"},
            "results": {"loss": 0.5},
        }
        assert tree.keys() == KEYS
        home = folder / "nemotron-output" / "store" / name / f"v{version}"
        home.mkdir(parents=True)
        (home / "artifact.json").write_text(json.dumps({**tree, SEAL: digest(tree)}, indent=2, sort_keys=True))


def sha(number: int) -> str:
    return f"sha256:{number:064x}"


def measure(folder: Path, words: tuple[str, ...]) -> tuple[float, float]:
    """(wall seconds, CPU seconds with the children) of one process."""
    began = time.monotonic()
    process = subprocess.Popen([*NEMOTRON, *words], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
