"""`make slurm-demo`: the tiny pipeline on a Slurm of two nodes, two processes on each, all on this machine.

The cluster, the runs and the artifacts lie in a temporary folder that goes with the demo, unless --keep names one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nemotron_recipes.errors import NemotronError, Problem, UserError
from slurm import clients, cluster

PROFILE = """\
[demo]
executor = "slurm"
account = "demo"
partition = "batch"
nodes = 2
ntasks_per_node = 2
time = "00:20:00"

[demo.env]
OMP_NUM_THREADS = "1"
"""
# A few steps of each stage: the point here is the way, not the model. Batches are divided among four processes.
SHORT = (
    *("sft.train.train_iters=20", "sft.train.micro_batch_size=8"),
    *("dpo.train.train_iters=5", "dpo.train.micro_batch_size=16"),
    *("rl.train.train_iters=5", "rl.train.micro_batch_size=32"),
    *("sft.evaluation.rows=40", "dpo.evaluation.rows=40", "rl.evaluation.rows=40"),
)


def main(argv: list[str] | None = None) -> int:
    """Up, run, list, down; the exit code is the run's."""
    what = "The tiny pipeline on a Slurm of two nodes."
    parser = argparse.ArgumentParser(prog="python -m slurm.demo", description=what)
    parser.add_argument("--keep", metavar="DIR", type=Path, help="an empty folder for the runs; they stay there")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="instead of the demo's own short stages")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="slurm-demo-") as temporary:
        work = options.keep or Path(temporary) / "work"
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            raise UserError(Problem(f"{work} is not empty", fix="--keep needs a new or an empty folder"))
        (work / "env.toml").write_text(PROFILE)
        spec = cluster.plan(Path(temporary) / "cluster", nodes=2, accounts=("demo",))
        print("starting a Slurm of two nodes ...", flush=True)
        spec = cluster.up(spec, while_pid=os.getpid())
        try:
            return _demonstrate(work, clients.environment(spec), options.overrides or SHORT)
        finally:
            cluster.down(Path(spec.folder))


def _demonstrate(work: Path, slurm: dict[str, str], overrides: Sequence[str]) -> int:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, **slurm, "PYTHONPATH": path}

    def show(shown: str, *argv: str) -> int:
        print(f"\n$ {shown}", flush=True)
        return subprocess.run(argv, cwd=work, env=environ, check=False).returncode

    nemotron = (sys.executable, "-m", "nemotron_recipes")
    show("sinfo", "sinfo")
    command = ("nano3", "pipe", "-c", "tiny", "--run", "demo", *overrides)
    code = show(f"nemotron {' '.join(command)}", *nemotron, *command)
    show("nemotron runs list", *nemotron, "runs", "list")
    show("sacct -X", "sacct", "-X", "--format=JobID,JobName%40,NodeList,State,ExitCode,Elapsed")
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except NemotronError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
