"""`nemotron doctor` and what is checked before anything is queued, on a real Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import slurm
from tests.helpers.plans import ROOT

pytestmark = pytest.mark.slurm

PROFILE = '[lab]\nexecutor = "slurm"\naccount = "lab"\ntime = "5"\n'
PREP = ("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "40", "--batch", "lab")


def test_the_doctor_and_the_preflight(slurm_cluster: slurm.Cluster, tmp_path: Path) -> None:
    (tmp_path / "env.toml").write_text(PROFILE)
    secret = "s3cr3t-that-nobody-may-read"

    def nemotron(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nemotron_recipes", *words]
        env = {**os.environ, **slurm_cluster.env, "PYTHONPATH": str(ROOT), "HF_TOKEN": secret}
        return slurm_cluster.run(*command, code=code, cwd=tmp_path, env=env)

    said = nemotron("doctor", "lab").stdout
    rows = ("partition batch (default)", "4 node(s) of 32 CPUs", "account lab", "enforces associations", "pmi2")
    for words in (*rows, "none of account or QOS; not enforced", "output folder quota"):
        assert words in said
    assert secret not in said
    told = json.loads(nemotron("doctor", "lab", "--json").stdout)
    assert {finding["state"] for finding in told["findings"]} <= {"ok", "warning"}
    suggested = told["suggestion"]
    assert (suggested["account"], suggested["partition"], suggested["gpus_per_node"]) == ("lab", "batch", 2)
    assert not (tmp_path / "nemotron-output").exists(), "looking leaves nothing"
    lines = [f"{key} = {json.dumps(value)}" for key, value in suggested.items()]
    (tmp_path / "env.toml").write_text("[lab]\n" + "\n".join(lines) + "\n")
    nemotron("env", "show", "lab")  # what is suggested is a profile
    assert "did you mean 'lab'" in nemotron("doctor", "la", code=2).stderr

    (tmp_path / "env.toml").write_text(PROFILE)
    wrong = ("run.time=2-0", "run.gpus_per_node=9", "run.account=nobodys", "run.python=/no/such/python")
    refused = nemotron(*PREP, *wrong, code=2).stderr
    for words in ("more than partition batch gives", "9 GPU(s)", "not one of this user's", "no interpreter"):
        assert words in refused
    assert not (tmp_path / "nemotron-output").exists(), "nothing was written or queued"
    sbatchs = nemotron(*PREP, "run.account=nobodys", "--skip-preflight", code=2).stderr
    assert "Slurm refuses" in sbatchs
    assert "Invalid account" in sbatchs


def test_the_doctor_looks_into_the_nodes_and_leaves_nothing(slurm_cluster: slurm.Cluster, tmp_path: Path) -> None:
    held = PROFILE.replace("[lab]", "[held]") + "additional_parameters = {hold = true}\n"
    (tmp_path / "env.toml").write_text(f"{PROFILE}nodes = 2\n{held}")

    def findings(*words: str, code: int) -> dict[str, dict[str, str]]:
        command = [sys.executable, "-m", "nemotron_recipes", "doctor", *words, "--deep", "--json"]
        env = {**os.environ, **slurm_cluster.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = slurm_cluster.run(*command, code=code, cwd=tmp_path, env=env, timeout=900)
        return {found["topic"]: found for found in json.loads(done.stdout)["findings"]}

    told = findings("lab", code=0)
    nodes = [found["text"] for topic, found in told.items() if topic.startswith("node ")]
    assert len(nodes) == 2
    for words in ("0 GPU(s), Python 3", "torch 2", "MB/s", "s from the login node's"):
        assert all(words in text for text in nodes), nodes
    assert "2 process(es), gloo" in told["all-reduce"]["text"]

    assert "it is held by its owner" in findings("held", "--deep-timeout=1", code=1)["nodes"]["text"]
    names = ("squeue", "--noheader", "--format=%j")
    slurm.wait_for(lambda: "nemotron-doctor" not in slurm_cluster.run(*names).stdout, "the job to be withdrawn")
    assert os.listdir(tmp_path) == ["env.toml"]
