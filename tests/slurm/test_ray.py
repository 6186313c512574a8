"""A stage of NeMo-RL on two nodes of a real Slurm with a real Ray; NeMo-RL's program alone is a fake."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemotron_recipes.rundir import RunDir, read_json, read_jsonl
from tests.helpers import fake_nemo_rl, real_ray, slurm
from tests.helpers.cli import nemotron

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.e2e]

WORDS = (
    *("nano3", "dpo", "-c", "nemo-rl", "model.path=model", "data.path=rows", "backend.image=null"),
    *("backend.native.base=examples/configs/dpo.yaml", "parallel.expert_model_parallel_size=1"),
    *("train.global_batch_size=4", "checkpoint.save_interval=10", "outputs.checkpoint=made"),
)


@pytest.fixture
def cluster(slurm_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    for name, value in (slurm_cluster.env | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    return slurm_cluster


class Lab:
    """A folder with a model, rows, and a profile of two nodes whose Python has Ray and the fake of NeMo-RL."""

    def __init__(self, folder: Path, steps: int, seconds: float, **profile: Any):
        self.folder, self.steps = folder, steps
        source = fake_nemo_rl.make(folder / "source", seconds)
        python = real_ray.python(folder / "environment", source)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "rows").mkdir()
        for split in ("train", "validation"):
            (folder / "rows" / f"{split}.jsonl").write_text("{}\n")
        told = {"executor": "slurm", "account": "lab", "nodes": 2, "time": "5", "python": str(python), **profile}
        lines = [f"{key} = {json.dumps(value)}" for key, value in told.items()]
        (folder / "env.toml").write_text("\n".join(["[lab]", *lines, ""]))

    def submit(self, cluster: slurm.Cluster) -> tuple[RunDir, str]:
        """The run's folder and the id of its job."""
        words = (*WORDS, f"train.train_iters={self.steps}", "--batch", "lab", "--json")
        said = json.loads(nemotron(self.folder, *words))
        return RunDir(self.folder / "nemotron-output" / "runs" / said["run"]), said["native"]["jobs"]["dpo"]


def info(run: RunDir) -> dict[str, Any]:
    """What the program wrote beside its last checkpoint, in the output of the stage."""
    store = run.path.parents[1] / "store"
    (file,) = store.rglob("training_info.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def came_up(run: RunDir, attempt: int = 1) -> dict[str, Any] | None:
    told = read_jsonl(run.stage("dpo").events(attempt, 0))
    return next((event for event in told if event["event"] == "ray-cluster"), None)


def of_ray(address: str) -> list[psutil.Process]:
    """Processes of the cluster at this address."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or ())
        port = address.rpartition(":")[2]
        if (address in words or f"gcs_server_port={port}" in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_two_nodes_train_together_and_leave_their_logs(cluster: slurm.Cluster, tmp_path: Path) -> None:
    run, job = Lab(tmp_path, steps=4, seconds=0.1).submit(cluster)
    assert cluster.wait(job, seconds=300)["JobState"] == "COMPLETED"
    record = read_json(run.stage("dpo").record)
    assert record is not None and (record["state"], record["results"]["step"]) == ("succeeded", 4)
    assert len(set(info(run)["nodes"])) == 2
    assert min(info(run)["open_files"]) >= min(65535, int(os.sysconf("SC_OPEN_MAX")))
    up = came_up(run)
    assert up is not None and up["nodes"] == 2
    slurm.wait_for(lambda: not of_ray(up["address"]), "Ray to be gone from both nodes")
    logs = run.stage("dpo").path / "ray" / "attempt-1" / "logs"
    assert {file.parent.name for file in logs.glob("*/raylet.out")} <= {"0-node1", "1-node2"}
    assert any(logs.glob("*/raylet.out")), "neither node kept Ray's own logs"  # here both have one disk


def test_it_is_saved_before_the_limit_and_goes_on_in_the_next_attempt(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """Of the limit, five minutes, the margin and the room for a last save leave 50 seconds to start in and train."""
    run, job = Lab(tmp_path, steps=45, seconds=1.0, max_requeues=30, save_margin=130.0).submit(cluster)
    assert cluster.wait(job, seconds=1500)["JobState"] == "COMPLETED"
    told = [event for event in read_jsonl(run.events) if event["event"] == "requeued"]
    assert told and {event["cause"] for event in told} == {"time-limit"}
    record = read_json(run.stage("dpo").record)
    assert record is not None and record["attempt"] == len(told) + 1 and record["results"]["step"] == 45
    assert info(run)["begin"] == told[-1]["step"] > 0
    ups = [came_up(run, attempt) for attempt in range(1, len(told) + 2)]
    assert all(ups) and len({up["address"] for up in ups if up}) == len(ups), "each attempt has a cluster of its own"


def test_a_node_that_loses_ray_ends_the_run_and_is_named(cluster: slurm.Cluster, tmp_path: Path) -> None:
    run, job = Lab(tmp_path, steps=600, seconds=1.0).submit(cluster)
    up = slurm.wait_for(lambda: came_up(run), "Ray to come up", seconds=300)
    joined = f"--address={up['address']}"
    (other,) = [process for process in of_ray(up["address"]) if {"start", joined} <= {*process.cmdline()}]
    (raylet,) = [p for p in other.children(recursive=True) if p.name() == "raylet"]
    raylet.kill()
    assert cluster.wait(job, seconds=300)["JobState"] == "FAILED"
    why = nemotron(tmp_path, "runs", "explain", run.path.name)
    assert "Ray ended on" in why
    slurm.wait_for(lambda: not of_ray(up["address"]), "Ray to be gone from both nodes")


def test_a_cancelled_run_takes_its_ray_with_it(cluster: slurm.Cluster, tmp_path: Path) -> None:
    run, job = Lab(tmp_path, steps=600, seconds=1.0).submit(cluster)
    up = slurm.wait_for(lambda: came_up(run), "Ray to come up", seconds=300)
    assert "cancelled" in nemotron(tmp_path, "runs", "cancel", run.path.name)
    assert cluster.wait(job, seconds=300)["JobState"] == "CANCELLED"
    slurm.wait_for(lambda: not of_ray(up["address"]), "Ray to be gone from both nodes")
