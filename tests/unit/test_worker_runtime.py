"""The worker as a real process: what it leaves behind when it ends well, fails, is stopped or is killed."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.records import load_run
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import UserError
from nemotron_recipes.fsio import path_digest
from nemotron_recipes.planning.resolve import Resolver
from nemotron_recipes.rundir import StageDir, append_event, read_json, read_jsonl
from nemotron_recipes.spec import Artifact, Producer
from nemotron_recipes.worker.inputs import resolve_inputs
from nemotron_recipes.worker.workerfile import attempt_from, load_worker_file, ranks_from

ROOT = Path(__file__).parents[2]


class Stage:
    """A stage folder, a store and a worker file for the probe."""

    def __init__(self, root: Path, name: str = "prep", **config: Any):
        self.dir = StageDir(root / "runs" / "r1" / name)
        self.store = Store(root / "store")
        self.file = root / f"{name}.yaml"
        self.tree: dict[str, Any] = {
            "worker": "probe",
            "run": {
                "id": "r1", "stage": name, "dir": str(self.dir.path),
                "store": str(self.store.root), "fingerprint": f"f-{name}",
            },
            "inputs": {},
            "outputs": [{"slot": "data", "name": f"{name}-out", "kind": "data"}],
            **config,
        }  # fmt: skip

    def takes(self, key: str, artifact: Artifact) -> Stage:
        self.tree["inputs"][key] = asdict(artifact)
        return self

    def start(self, *args: str, rank: int = 0, world: int = 1, **env: str) -> subprocess.Popen[str]:
        self.file.write_text(json.dumps(self.tree))
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.worker_probe", "--config", str(self.file), *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**clean_environment(), "RANK": str(rank), "WORLD_SIZE": str(world), **env},
        )  # fmt: skip

    def run(self, *args: str, **env: str) -> tuple[int, str, str]:
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def started(self, rank: int = 0, event: str = "sleeping") -> None:
        """Wait until this rank has written the event."""
        deadline = time.monotonic() + 30
        while event not in self.events(rank):
            assert time.monotonic() < deadline, self.events(rank)
            time.sleep(0.02)

    def events(self, rank: int = 0, attempt: int = 1) -> list[str]:
        return [event["event"] for event in read_jsonl(self.dir.events(attempt, rank))]

    def log(self, rank: int = 0, attempt: int = 1) -> str:
        return self.dir.log(attempt, rank).read_text()

    @property
    def record(self) -> dict[str, Any] | None:
        return read_json(self.dir.record)


def clean_environment() -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if key not in ("NEMOTRON_ATTEMPT", "LOCAL_RANK")}
    return {**own, "PYTHONPATH": str(ROOT)}


def test_a_stage_that_succeeds(tmp_path: Path) -> None:
    stage = Stage(tmp_path, loss="nan")
    code, out, err = stage.run()
    assert (code, out) == (0, "")
    assert stage.log().splitlines() == ["hello from rank 0", "hello from a child process"]
    assert stage.events() == ["started", "inputs-verified", "registered", "finished"]
    made = stage.store.resolve("prep-out")
    assert err.startswith(f"succeeded\n  data: {made.uri}\n  log: "), "whoever started it by hand is told"
    assert made.producer == Producer("f-prep", "r1", "prep", "data")
    stage.store.verify(made)
    manifest = stage.store.describe(made)
    assert manifest["metadata"] == {"rows": 3} and manifest["producer"]["config"] == {"loss": "nan"}
    record = stage.record
    assert record
    assert (record["state"], record["exit_code"], record["attempt"], record["results"]) == (
        "succeeded",
        0,
        1,
        {"loss": None, "rows": 3},
    )
    assert record["outputs"] == {
        "data": {"name": "prep-out", "version": 1, "digest": made.digest, "uri": made.uri},
    }
    assert (
        record["started"] <= record["ended"] and record["python"] and record["host"] and "numpy" in record["versions"]
    )


def test_a_pipe_by_hand_pins_the_pending_input(tmp_path: Path) -> None:
    first = Stage(tmp_path, "prep", text="rows")
    assert first.run()[0] == 0
    pending = Artifact("pending", "data", "prep-out", producer=Producer("f-prep", "r1", "prep", "data"))
    second = (
        Stage(tmp_path, "sft").takes("data.path", pending).takes("model.path", Artifact("builtin", "model", "tiny"))
    )
    assert second.run()[0] == 0
    made = first.store.resolve("prep-out")
    for parents in (second.record["parents"], second.store.describe(second.store.resolve("sft-out"))["parents"]):  # type: ignore[index]
        assert [parent.pop("input") for parent in parents] == ["data.path", "model.path"]
        assert [Artifact.from_tree(parent).label for parent in parents] == ["prep-out:v1", "builtin:tiny"]
        assert parents[0]["digest"] == made.digest


def test_a_pending_input_that_nobody_made_is_fatal(tmp_path: Path) -> None:
    other = Stage(tmp_path, "prep")
    assert other.run()[0] == 0
    never = Artifact("pending", "data", "prep-out", producer=Producer("f-prep", "r0", "prep", "data"))  # another run's
    stage = Stage(tmp_path, "sft").takes("data.path", never)
    code, _, err = stage.run()
    assert code == 2 and "input data.path: run r0 has registered no output 'data' of stage prep" in err
    assert stage.record and (stage.record["state"], stage.record["exit_code"]) == ("failed", 2)
    assert "Traceback" not in stage.log() and stage.store.names() == ["prep-out"]


def test_every_bad_input_is_named_at_once_and_nothing_runs(tmp_path: Path) -> None:
    first = Stage(tmp_path, "prep")
    assert first.run()[0] == 0
    made = first.store.resolve("prep-out")
    changed = Path(made.uri) / "data.txt"
    changed.chmod(0o644)
    changed.write_text("other")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("1\n")
    pinned = Artifact("path", "data", uri=str(rows), digest=path_digest(str(rows)))
    rows.write_text("2\n")
    stage = Stage(tmp_path, "sft").takes("a", made).takes("b", pinned)
    stage.takes("c", Artifact("path", "data", uri=str(tmp_path / "no" / "*.jsonl"), digest="sha256:1"))
    stage.takes("d", Artifact("store", "data", "prep-out", version=7))
    code, _, err = stage.run()
    assert code == 2
    for text in (
        "input a: prep-out:v1 has changed",
        "input b: ",
        "input c: ",
        "input d: artifact 'prep-out' has no 'v7'",
    ):
        assert text in err
    assert "hello" not in stage.log()


@pytest.mark.parametrize("pattern", ["rows", "rows/a.jsonl", "rows/*.jsonl", "rows/**/*.jsonl"])
def test_what_planning_pinned_is_what_the_worker_verifies(tmp_path: Path, pattern: str) -> None:
    for name in ("a.jsonl", "a-b.jsonl", "deep/b.jsonl", "deep-er/c.jsonl"):
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_text(name)
    store = Store(tmp_path / "store")
    pinned = Resolver(store, tmp_path, lambda name: ()).resolve(pattern, "data")
    paths, _ = resolve_inputs({"a": pinned}, store, verify=True)
    assert paths == {"a": tmp_path / pattern}
    (tmp_path / "rows" / "a.jsonl").write_text("changed")
    with pytest.raises(UserError, match="has changed"):
        resolve_inputs({"a": pinned}, store, verify=True)


def test_only_the_first_rank_reads_the_data_to_verify_it(tmp_path: Path) -> None:
    first = Stage(tmp_path, "prep")
    assert first.run()[0] == 0
    made = first.store.resolve("prep-out")
    (Path(made.uri) / "more").write_text("")
    paths, _ = resolve_inputs({"a": made}, first.store, verify=False)
    assert paths == {"a": Path(made.uri)}
    with pytest.raises(UserError):
        resolve_inputs({"a": made}, first.store, verify=True)


def test_a_failure_is_told_everywhere(tmp_path: Path) -> None:
    stage = Stage(tmp_path, action="write-and-raise")
    code, _, err = stage.run()
    assert code == 1 and err == f"rank 0 failed: ValueError: boom\n  log: {stage.dir.log(1, 0)}\n"
    assert "Traceback" in stage.log() and stage.events()[-1] == "failed"
    failure = stage.dir.first_failure(1)
    assert failure and failure["lines"][-1] == "ValueError: boom" and failure["rank"] == 0
    assert stage.record and (stage.record["error"], stage.record["rank"]) == ("ValueError: boom", 0)
    assert stage.store.names() == [] and list((stage.store.root / ".staging").iterdir()) == []


def test_a_failure_is_recorded_also_when_the_launcher_is_gone(tmp_path: Path) -> None:
    stage = Stage(tmp_path, action="raise")
    process = stage.start()
    assert process.stdout and process.stderr
    process.stdout.close()
    process.stderr.close()
    assert process.wait(30) == 1
    assert stage.record and stage.record["state"] == "failed"


@pytest.mark.parametrize(
    ("action", "code", "text"),
    [
        ("user-error", 2, "no such column"),
        ("import", 2, "pip install 'nemotron-recipes[probing]'"),
        ("nothing", 1, "without writing its outputs: data"),
    ],
)
def test_an_error_with_a_message_has_no_traceback(tmp_path: Path, action: str, code: int, text: str) -> None:
    stage = Stage(tmp_path, action=action)
    assert stage.run()[0] == code
    assert text in stage.log() and "Traceback" not in stage.log()
    assert stage.record and stage.record["exit_code"] == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_a_module_that_doesnt_watch_for_it(tmp_path: Path, number: int) -> None:
    stage = Stage(tmp_path, action="sleep")
    process = stage.start()
    stage.started()
    process.send_signal(number)
    assert process.wait(10) == 130
    assert stage.record and (stage.record["state"], stage.record["exit_code"]) == ("cancelled", 130)
    assert stage.dir.first_failure(1) is None and stage.events()[-2:] == ["stop-requested", "cancelled"]


def test_a_module_that_watches_may_finish_its_step(tmp_path: Path) -> None:
    stage = Stage(tmp_path, action="watch")
    process = stage.start()
    stage.started()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the launcher and torchrun both pass it on: still one wish
    assert process.wait(10) == 130
    assert "saved" in stage.log()
    assert stage.record and stage.record["state"] == "cancelled" and stage.store.names() == []


def test_a_second_stop_ends_it_at_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, action="watch", linger=60)
    process = stage.start()
    stage.started()
    process.send_signal(signal.SIGTERM)
    time.sleep(2.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 130
    assert stage.record and stage.record["state"] == "cancelled"


def test_another_ranks_failure_is_the_cause(tmp_path: Path) -> None:
    stage = Stage(tmp_path, action="raise", only=1)
    first, second = stage.start(rank=0, world=2), stage.start(rank=1, world=2)
    assert second.wait(30) == 1
    stage.started()
    first.send_signal(signal.SIGTERM)  # as torchrun does when a rank has failed
    assert first.wait(10) == 130
    record = stage.record
    assert record and (record["state"], record["rank"], record["error"], record["exit_code"]) == (
        "failed", 1, "ValueError: boom", 1,
    )  # fmt: skip


def test_a_rank_with_a_run_folder_of_its_own_is_not_waited_for(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    first = stage.start(rank=0, world=2, NEMOTRON_RANKS_HERE="1")
    assert first.wait(60) == 0
    assert stage.record and (stage.record["state"], stage.record["world_size"]) == ("succeeded", 2)


def test_a_killed_worker_is_reconciled(tmp_path: Path) -> None:
    stage = Stage(tmp_path, action="kill")
    assert stage.run()[0] == -signal.SIGKILL
    assert stage.record is None
    plan = {
        "id": "r1",
        "title": "",
        "created": "",
        "stages": [{"name": "prep", "fingerprint": "f-prep", "reused": None}],
    }
    (tmp_path / "runs" / "r1" / "plan.json").write_text(json.dumps(plan))
    view = load_run(tmp_path / "runs" / "r1")
    assert view.stages[0].state == "lost" and "rank 0 ended without a word" in view.stages[0].explanation


def test_an_attempt_counts_on_and_never_overwrites_a_success(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert stage.run()[0] == 0
    code, _, err = stage.run(NEMOTRON_ATTEMPT="1")
    assert code == 2 and "already succeeded" in err
    assert stage.run()[0] == 0
    assert stage.record and stage.record["attempt"] == 2 and stage.events(attempt=2)[-1] == "finished"
    assert stage.store.versions("prep-out") == [1, 2]


def test_a_start_by_hand_shows_the_log_too(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    code, out, _ = stage.run("--foreground")
    assert code == 0 and out == stage.log() != ""
    stage = Stage(tmp_path, "tty", action="user-error")
    stage.file.write_text(json.dumps(stage.tree))
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.worker_probe", "--config", str(stage.file)],
        stdout=slave, stderr=slave, env=clean_environment(),
    )  # fmt: skip
    os.close(slave)
    assert process.wait(30) == 2
    assert os.read(master, 65536).decode().count("no such column") == 1
    os.close(master)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"worker": "data_perp"}, "did you mean 'data_prep'"),
        ({"worker": None}, "is unknown"),
        ({"run": {"id": "r", "stage": "s", "dri": "/d", "store": "/s", "fingerprint": "f"}}, "did you mean 'dir'"),
        ({"inputs": {"a": {"sorce": "path", "kind": "data"}}}, "sorce"),
        ({"inputs": {"a": {"source": "pending", "kind": "data"}}}, "names no producer"),
        ({"inputs": ["a"]}, "isn't a mapping"),
        ({"outputs": [{"slot": "data"}]}, "slot, name and kind"),
    ],
)
def test_a_wrong_worker_file_is_one_clear_message(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    stage = Stage(tmp_path)
    stage.tree = {**stage.tree, "worker": "data_prep", **change}
    stage.file.write_text(json.dumps(stage.tree))
    with pytest.raises(UserError) as error:
        load_worker_file(stage.file)
    assert text in str(error.value) and str(stage.file) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "worker: [", "worker: data_prep\nworker: trl\n", "1: 2", "\x00", None])
def test_a_file_that_is_no_worker_file(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "w.yaml"
    if text is not None:
        path.write_text(text)
    process = subprocess.run(
        [sys.executable, "-m", "nemotron_recipes.worker", "--config", str(path)],
        capture_output=True, text=True, env=clean_environment(),
    )  # fmt: skip
    assert process.returncode == 2 and process.stderr.startswith("error: ") and "Traceback" not in process.stderr
    assert [p for p in tmp_path.iterdir() if p != path] == []


@pytest.mark.parametrize("text", ["1e-5", "1.0e-05", "1.e-5", "0.00001", "+1E-5"])
def test_numbers_are_numbers_in_yaml_and_json(tmp_path: Path, text: str) -> None:
    stage = Stage(tmp_path)
    tree = {**stage.tree, "worker": "trl"}
    stage.file.write_text(json.dumps(tree)[:-1] + f', "lr": {text}, "name": "1e-5"}}')
    config = load_worker_file(stage.file).config
    assert config == {"lr": 1e-5, "name": "1e-5"}


def test_ranks_and_attempts_come_from_the_environment(tmp_path: Path) -> None:
    assert ranks_from({}) == ranks_from({"RANK": "", "WORLD_SIZE": "1"})
    assert ranks_from({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}).local_rank == 1
    for environment in ({"RANK": "x"}, {"RANK": "-1"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(UserError):
            ranks_from(environment)
    assert attempt_from({}, StageDir(tmp_path)) == 1
    assert attempt_from({"NEMOTRON_ATTEMPT": "4"}, StageDir(tmp_path)) == 4
    with pytest.raises(UserError):
        attempt_from({"NEMOTRON_ATTEMPT": "one"}, StageDir(tmp_path))


@pytest.mark.e2e
def test_under_torchrun(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.file.write_text(json.dumps(stage.tree))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*torchrun, "-m", "tests.helpers.worker_probe", "--config", str(stage.file)]
    environment = {**clean_environment(), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=120)
    assert process.returncode == 0, process.stderr
    assert [stage.events(rank)[-1] for rank in (0, 1)] == ["finished", "finished"]
    assert stage.record and stage.record["world_size"] == 2 and stage.store.versions("prep-out") == [1]
    stage.tree.update(action="raise", only=1)
    stage.file.write_text(json.dumps(stage.tree))
    process = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=120)
    assert process.returncode == 1
    assert stage.record and (stage.record["attempt"], stage.record["state"], stage.record["rank"]) == (2, "failed", 1)
    assert "rank 1 failed: ValueError: boom" in process.stderr
    stage.tree.update(action="kill")
    stage.file.write_text(json.dumps(stage.tree))
    process = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=120)
    assert process.returncode == 1
    stage.dir.launcher_log(3).write_text(process.stderr)
    plan = {"id": "r1", "title": "", "created": "", "stages": [{"name": "prep", "fingerprint": "", "reused": None}]}
    (tmp_path / "runs" / "r1" / "plan.json").write_text(json.dumps(plan))
    append_event(tmp_path / "runs" / "r1" / "events.jsonl", "stage-exited", stage="prep", attempt=3, exit_code=1)
    view = load_run(tmp_path / "runs" / "r1").stages[0]
    assert (view.state, view.attempt) == ("failed", 3)
    assert "nobody cancelled" in view.note and "rank 1 ended with exit code 137 (SIGKILL" in view.explanation
