"""`make slurm-demo`, with even fewer steps: recipes, launcher, torchrun and gloo across two nodes of a real Slurm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_recipes.rundir import StageDir, read_json, read_jsonl
from tests.helpers import slurm
from tests.helpers.plans import ROOT


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.slurm
def test_the_tiny_pipeline_on_two_nodes(tmp_path: Path) -> None:
    slurm.require()
    words = [f"{stage}.{key}" for stage in ("sft", "dpo", "rl") for key in ("train.train_iters=2", "evaluation.rows=4")]
    words += ["sft.train.micro_batch_size=8", "dpo.train.micro_batch_size=16", "rl.train.micro_batch_size=32"]
    argv = [sys.executable, "-m", "slurm.demo", "--keep", str(tmp_path / "work"), *words]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "node[1-2]" in done.stdout
    (run,) = (tmp_path / "work" / "nemotron-output" / "runs").iterdir()
    for name in ("sft", "dpo", "rl"):
        stage = StageDir(run / name)
        record = read_json(stage.record)
        assert record is not None
        assert (record["state"], record["world_size"]) == ("succeeded", 4)
        hosts = {next(read_jsonl(stage.events(1, rank)))["host"] for rank in range(4)}
        assert len(hosts) == 2, hosts
    assert not (run / "secrets.json").exists()
