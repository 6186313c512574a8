"""What the doctor makes of the files of the job that looks into the nodes. The files are of the test cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.executors.slurm import deep
from nemotron_recipes.executors.slurm.profile import SlurmProfile

RECORDED = Path(__file__).parents[1] / "recorded" / "slurm-22.05" / "deep"  # 2 nodes, a process each, no GPU


def _texts(**changed: dict[str, Any] | None) -> dict[str, str]:
    """The files; of `facts_0` and so on the fields changed, or the file left out."""
    texts = {path.name: path.read_text() for path in RECORDED.iterdir()}
    for name, fields in changed.items():
        file = f"{name.replace('_', '-')}.json"
        tree = json.loads(texts.pop(file))
        if fields is not None:
            texts[file] = json.dumps({**tree, **fields})
    return texts


def test_nodes_that_are_well() -> None:
    found = deep.judged(_texts(), "COMPLETED", 0.0, SlurmProfile(nodes=2))
    assert [(f.topic, f.state) for f in found.findings] == [
        ("node node1", "ok"),
        ("node node2", "ok"),
        ("all-reduce", "ok"),
    ]
    assert found.suggestion == {}


@pytest.mark.parametrize(
    ("profile", "changed", "exclude", "words"),
    [
        ({}, {"facts_1": None, "reduce_1": None}, "node2", "no word from it"),
        ({}, {"facts_0": {"ahead": 30.0}}, "node1", "-30.0 s from the login node's"),
        ({}, {"facts_1": {"folder_error": "Permission denied"}}, "node2", "shared folder: Permission denied"),
        (
            {"gpus_per_node": 1, "exclude": "n9"},
            {"facts_0": {"gpus": 1}, "facts_1": {"gpu_error": "GPU 0 is lost"}},
            "n9,node2",
            "of 1 GPU(s) that it should have nvidia-smi sees 0: GPU 0 is lost",
        ),
    ],
)
def test_a_bad_node_is_left_out(profile: dict[str, Any], changed: dict[str, Any], exclude: str, words: str) -> None:
    found = deep.judged(_texts(**changed), "COMPLETED", 0.0, SlurmProfile(nodes=2, **profile))
    (bad,) = [finding for finding in found.findings[:2] if finding.state == "problem"]
    assert words in bad.text
    assert found.suggestion == {"exclude": exclude}


@pytest.mark.parametrize(
    ("changed", "state", "words"),
    [
        ({"reduce_1": None}, "problem", "1 of 2 processes"),
        ({"reduce_0": {"error": "gloo: Connection closed"}}, "problem", "node1: gloo: Connection closed"),
        ({"reduce_0": {"skipped": "not every node can import torch"}}, "warning", "not tried"),
    ],
)
def test_a_sum_that_fails_is_no_single_nodes_fault(changed: dict[str, Any], state: str, words: str) -> None:
    found = deep.judged(_texts(**changed), "COMPLETED", 0.0, SlurmProfile(nodes=2))
    assert (found.findings[-1].state, words in found.findings[-1].text) == (state, True)
    assert found.suggestion == {}


def test_a_job_that_started_nothing_excludes_nobody() -> None:
    texts = {"hosts": "node1\nnode2\n", "out.txt": "slurmstepd: error: execve(): /no/python: No such file\n"}
    found = deep.judged(texts, "FAILED", 0.0, SlurmProfile(nodes=2))
    assert ("execve(): /no/python" in found.findings[0].text, found.suggestion) == (True, {})


def test_the_script_asks_for_what_the_profile_asks_for() -> None:
    profile = SlurmProfile(nodes=2, gpus_per_node=4, account="lab", partition="batch", setup=["module load cuda"])
    text = deep.script(profile, "nemotron-doctor-1", "/shared/.d")
    for line in ("#SBATCH --account=lab", "#SBATCH --partition=batch", "#SBATCH --gpus-per-node=4", "module load cuda"):
        assert f"\n{line}\n" in text
    assert " --ntasks=8 --ntasks-per-node=4 --overcommit " in text
    assert text.rstrip().count("/shared/.d/node_probe.py /shared/.d") == 1
