#!/usr/bin/env python3
"""From a command to a job that Slurm has accepted: ours, a bare `sbatch` of the same script, a minimal NeMo-Run.

usage: python bench/submission.py [--runs N]

Brings up a test cluster (slurm/testcluster, which needs `make test-system`), submits jobs that are held and never run,
and takes the cluster down. Prints a Markdown table (docs/bench.md): medians of N runs that take turns. Exits 1 when
ours takes more than 1.1 times NeMo-Run's, when the dry run is above its limit, or when a submission fails. Run it with
the Python of the environment that holds the `nemotron` command. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTCLUSTER = ROOT / "slurm" / "testcluster"
NEMOTRON = str(Path(sys.executable).parent / "nemotron")
WORDS = ("nano3", "data", "prep", "sft", "-c", "tiny", "--force", "--batch", "lab")
MOST = 1.1  # times what NeMo-Run takes
DRY_RUN_LIMIT = 2.5  # CPU seconds

PROFILE = """
[artifacts]
output = "output"
store = "store"

[lab]
executor = "slurm"
time = "5"
additional_parameters = { hold = true }
"""

# NEMORUN_HOME is also where its tunnel puts the job, or sbatch is told a path that is not there.
NEMO_RUN = """
import os, sys
if sys.argv[1:] == ["--without-torch"]:
    sys.modules["torch"] = None
import nemo_run as run
tunnel = run.LocalTunnel(job_dir=os.environ["NEMORUN_HOME"] + "/experiments")
executor = run.SlurmExecutor(
    account="bench", time="00:05:00", nodes=1, ntasks_per_node=1, tunnel=tunnel,
    packager=run.Packager(), additional_parameters={"hold": True},
)
with run.Experiment("bench", executor=executor) as experiment:
    experiment.add(run.Script(inline="true"), executor=executor, name="job")
    experiment.run(detach=True)
"""

# Stands in front of the real sbatch and notes when that has answered.
STAMPING_SBATCH = """#!/bin/sh
"{sbatch}" "$@"
code=$?
date +%s.%N >> "{stamps}"
exit $code
"""


@dataclass
class Way:
    """One way to submit. accepted: seconds until sbatch had answered; whole, cpu: seconds of the whole process."""

    label: str
    argv: list[str]
    accepted: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description="From a command to a job that Slurm has accepted.")
    parser.add_argument("--runs", type=int, default=7, help="runs per way (default 7)")
    runs = parser.parse_args().runs
    if not Path(NEMOTRON).exists():
        print(f"error: no `nemotron` beside {sys.executable}: install the package there first", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        cluster = [sys.executable, str(TESTCLUSTER), "up", "--no-accounting", f"--dir={folder / 'slurm'}"]
        if subprocess.run([*cluster, f"--while={os.getpid()}"], stdout=subprocess.DEVNULL).returncode:
            return 1
        try:
            return measure(folder, runs)
        finally:
            down = [sys.executable, str(TESTCLUSTER), "down", f"--dir={folder / 'slurm'}"]
            subprocess.run(down, stdout=subprocess.DEVNULL, check=True)


def measure(folder: Path, runs: int) -> int:
    """All ways in turn; prints the table."""
    environ = prepare(folder)
    timed(Way("warm-up", [NEMOTRON, *WORDS]), folder, environ)
    (script,) = (folder / "output").glob("runs/*/*/files/sbatch.sh")
    bare = Way("`sbatch` of the same script", ["sbatch", "--parsable", str(script)])
    ours = Way("`nemotron ... --batch`", [NEMOTRON, *WORDS])
    nemo = Way("NeMo-Run, minimal", [sys.executable, "nemo.py"])
    lean = Way("NeMo-Run, minimal, where torch is not installed", [sys.executable, "nemo.py", "--without-torch"])
    dry = Way("`nemotron ... --batch --dry-run`", [NEMOTRON, *WORDS, "--dry-run"])
    for _ in range(runs):
        for way in (bare, ours, nemo, lean, dry):
            timed(way, folder, environ)
    print(table([bare, ours, nemo, lean, dry], lean, runs))
    problems = []
    if (ratio := statistics.median(ours.accepted) / statistics.median(nemo.accepted)) > MOST:
        problems.append(f"ours takes {ratio:.2f} times as long as NeMo-Run, more than {MOST}")
    if (cpu := statistics.median(dry.cpu)) > DRY_RUN_LIMIT:
        problems.append(f"the dry run takes {cpu:.2f} CPU s, more than {DRY_RUN_LIMIT}")
    for problem in problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    return 1 if problems else 0


def prepare(folder: Path) -> dict[str, str]:
    """The files that the ways need; the environment that they get."""
    (folder / "env.toml").write_text(PROFILE)
    (folder / "nemo.py").write_text(NEMO_RUN)
    wrapper = folder / "bin" / "sbatch"
    wrapper.parent.mkdir()
    sbatch = shutil.which("sbatch", path=f"{os.environ['PATH']}:/usr/bin:/usr/local/bin")
    wrapper.write_text(STAMPING_SBATCH.format(sbatch=sbatch, stamps=folder / "stamps"))
    wrapper.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    return kept | {
        "PATH": f"{wrapper.parent}:{kept['PATH']}",
        "SLURM_CONF": str(folder / "slurm" / "etc" / "slurm.conf"),
        "NEMORUN_HOME": str(folder / "nemo-run"),
        "NEMOTRON_ENV": str(folder / "env.toml"),
    }


def timed(way: Way, folder: Path, environ: dict[str, str]) -> None:
    """One submission. What it prints is shown only when it fails."""
    stamps = folder / "stamps"
    stamps.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as output:
        began = time.time()
        process = subprocess.Popen(
            way.argv, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.time()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{way.label} ended with {process.returncode}:\n{output.read().decode(errors='replace')}")
    way.whole.append(ended - began)
    way.cpu.append(usage.ru_utime + usage.ru_stime)
    if stamps.exists():
        way.accepted.append(float(stamps.read_text().split()[-1]) - began)


def table(ways: list[Way], reference: Way, runs: int) -> str:
    against = statistics.median(reference.accepted)
    lines = [
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores; "
        f"median of {runs} runs.",
        "",
        "| | accepted after, s | min to max | × NeMo-Run without torch | CPU s of the whole command |",
        "|---|---|---|---|---|",
    ]
    for way in ways:
        row = ["", "", ""]
        if way.accepted:
            middle = statistics.median(way.accepted)
            row = [f"{middle:.2f}", f"{min(way.accepted):.2f} to {max(way.accepted):.2f}", f"{middle / against:.2f}"]
        lines.append(f"| {way.label} | {' | '.join(row)} | {statistics.median(way.cpu):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
