"""Data prep over a Slurm array: the bytes of one machine, and only what a lost task leaves undone is done again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.rundir import RunDir, read_jsonl
from tests.helpers import slurm
from tests.helpers.cli import nemotron
from tests.helpers.data_prep import bytes_of, chat, write_rows

pytestmark = pytest.mark.slurm

FILES = 7  # each is a shard, or more
WORDS = ("nano3", "data", "prep", "sft", "data.tokenizer=tiny", "data.pack_size=128", "data.workers=1")
LAB = '[lab]\nexecutor = "slurm"\naccount = "lab"\ntime = "5"\n'


@pytest.fixture
def cluster(slurm_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return slurm_cluster


def prepared(folder: Path) -> dict[str, bytes]:
    """The bytes of the only artifact in the folder's store."""
    (metadata,) = (folder / "nemotron-output" / "store").rglob("metadata.json")
    return bytes_of(metadata.parent)


def rows(folder: Path) -> str:
    """Files with good and bad rows; the source that they are."""
    folder.mkdir()
    for number in range(FILES):
        talks: list[Any] = [chat(f"What is {n}?", f"It is {n * number}, " + "so " * n) for n in range(20 + number)]
        write_rows(folder / f"{number}.jsonl", [*talks, {"messages": number}])
    return f"data.sources=[{{path: {folder}}}]"


def submit(folder: Path, source: str, *words: str) -> tuple[dict[str, Any], Path]:
    """Submit three tasks and the job that merges; what the command said, and the run's folder."""
    said: dict[str, Any] = json.loads(
        nemotron(folder, *WORDS, source, "--batch", "lab", "--json", "run.data_array=3", *words)
    )
    return said, folder / "nemotron-output" / "runs" / said["run"]


def one_machine(folder: Path, source: str) -> dict[str, bytes]:
    folder.mkdir()
    nemotron(folder, *WORDS, source)
    return prepared(folder)


def last_line(run: Path, pattern: str) -> str:
    """What the job that merges said of the shards."""
    text = "".join(path.read_text() for path in sorted((run / "data-prep-sft" / "logs").rglob("*.log")))
    (found,) = set(re.findall(pattern, text))
    return str(found)


def test_a_lost_task_is_made_up_for_and_the_bytes_are_those_of_one_machine(
    cluster: slurm.Cluster, tmp_path: Path
) -> None:
    source, many = rows(tmp_path / "rows"), tmp_path / "many"
    many.mkdir()
    (many / "env.toml").write_text(LAB)
    said, run = submit(many, source, "run.additional_parameters={hold: true}")
    array, merging = (said["native"]["jobs"][name] for name in ("data-prep-sft.array", "data-prep-sft"))
    (accepted,) = [event for event in read_jsonl(RunDir(run).events) if event["event"] == "job-accepted"]
    assert (accepted["job"], accepted["array"]) == (merging, array)
    assert cluster.job(merging)["Dependency"].startswith(f"afterany:{array}_*")
    cluster.run("scancel", f"{array}_1")
    cluster.run("scontrol", "release", array)
    cluster.run("scontrol", "release", merging)
    assert "succeeded" in nemotron(many, "runs", "logs", "-f", said["run"])
    logs = run / "data-prep-sft" / "logs"
    for task, shards in ((0, 3), (2, 2)):  # 0, 3, 6 and 2, 5
        assert f"part {task} of 3: {shards} of 7 shards are done" in (logs / f"nodes-{array}_{task}.out").read_text()
    assert not (logs / f"nodes-{array}_1.out").exists()
    assert last_line(run, r"(\d+) shards were there from an earlier run") == "5", "1 and 4 alone were missing"
    assert prepared(many) == one_machine(tmp_path / "one", source)


@pytest.mark.long
def test_a_task_whose_node_goes_comes_back_alone(cluster: slurm.Cluster, tmp_path: Path) -> None:
    source, many = rows(tmp_path / "rows"), tmp_path / "many"
    many.mkdir()
    once = '[ "$SLURM_ARRAY_TASK_ID" != 1 ] || [ -n "$SLURM_RESTART_COUNT" ]'
    again = f'{once} || {{ scontrol requeue "$SLURM_JOB_ID"; sleep 300; }}'
    (many / "env.toml").write_text(f"{LAB}setup = ['''{again}''']\n")
    said, run = submit(many, source)
    assert "succeeded" in nemotron(many, "runs", "logs", "-f", said["run"])
    array = said["native"]["jobs"]["data-prep-sft.array"]
    (log,) = (run / "data-prep-sft" / "logs").glob(f"slurm-{array}_1.out")
    assert log.read_text().count("job exited with code 0") == 1
    assert last_line(run, r"(\d+) shards were there from an earlier run") == "7", "nothing was left to do"
    assert prepared(many) == one_machine(tmp_path / "one", source)


@pytest.mark.long
def test_cancelling_takes_the_array_along(cluster: slurm.Cluster, tmp_path: Path) -> None:
    source, many = rows(tmp_path / "rows"), tmp_path / "many"
    many.mkdir()
    (many / "env.toml").write_text(LAB)
    said, _ = submit(many, source, "run.additional_parameters={hold: true}")
    nemotron(many, "runs", "cancel", said["run"])
    for job in said["native"]["jobs"].values():
        assert cluster.job(job)["JobState"] == "CANCELLED"


@pytest.mark.long
def test_a_task_that_meets_its_time_limit_costs_its_own_shards_alone(cluster: slurm.Cluster, tmp_path: Path) -> None:
    source, many = rows(tmp_path / "rows"), tmp_path / "many"
    many.mkdir()
    slow = '[ "$SLURM_ARRAY_TASK_ID" != 1 ] || { scontrol update JobId="$SLURM_JOB_ID" TimeLimit=1; sleep 600; }'
    (many / "env.toml").write_text(f"{LAB}setup = ['''{slow}''']\n")
    said, run = submit(many, source)
    assert "succeeded" in nemotron(many, "runs", "logs", "-f", said["run"])
    array = said["native"]["jobs"]["data-prep-sft.array"]
    assert "DUE TO TIME LIMIT" in (run / "data-prep-sft" / "logs" / f"slurm-{array}_1.out").read_text()
    assert last_line(run, r"(\d+) shards were there from an earlier run") == "5", "1 and 4 alone were missing"
    assert prepared(many) == one_machine(tmp_path / "one", source)
