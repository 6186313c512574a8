"""A sweep on a real Slurm: queued at once, one after the other without anybody alive, tabulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.rundir import RunDir, read_jsonl
from tests.helpers import slurm
from tests.helpers.cli import nemotron
from tests.helpers.plans import ROOT

pytestmark = pytest.mark.slurm

WORDS = ("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "40")


@pytest.fixture
def cluster(slurm_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("NEMOTRON_ENV", raising=False)
    return slurm_cluster


def times(run_dir: Path, *names: str) -> list[float]:
    return [event["time"] for event in read_jsonl(RunDir(run_dir).events) if event["event"] in names]


def test_one_after_the_other_with_nobody_alive(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """The first is held: the others wait for it, and each starts when the one before is over."""
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\naccount = "lab"\ntime = "5"\n')
    flags = (
        "data.pack_size=128,256,512",
        "--multirun",
        "--max-parallel",
        "1",
        "run.additional_parameters={hold: true}",
    )
    told: dict[str, Any] = json.loads(nemotron(tmp_path, *WORDS, *flags, "--batch", "lab", "--json"))
    runs = [entry["run"] for entry in told["runs"]]
    folders = [tmp_path / "nemotron-output" / "runs" / run for run in runs]
    jobs = [json.loads((folder / "handle.json").read_text())["native"]["jobs"]["data-prep-sft"] for folder in folders]
    assert [cluster.job(job)["Dependency"] for job in jobs] == [
        "(null)",
        *(f"afterany:{job}(unfulfilled)" for job in jobs[:2]),
    ]
    again = json.loads(nemotron(tmp_path, *WORDS, *flags, "--batch", "lab", "--json"))
    assert [entry["run"] for entry in again["runs"]] == runs, "the same sweep: nothing is submitted twice"
    listed = json.loads(nemotron(tmp_path, "runs", "list", "--json"))
    assert {view["state"] for view in listed} == {"pending"}
    cluster.run("scontrol", "release", *jobs[1:])
    cluster.run("scancel", jobs[0])  # however the one before has ended
    for job in jobs[1:]:
        assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert times(folders[2], "stage-started") > times(folders[1], "finished")
    table = nemotron(tmp_path, "runs", "compare", told["sweep"])
    assert "data.pack_size" in table
    assert all(run in table for run in runs)
    assert f"{runs[0]}: cancelled" in nemotron(tmp_path, "runs", "cancel", told["sweep"])
