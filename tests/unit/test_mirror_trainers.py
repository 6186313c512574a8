"""A trainer's own W&B log, told by the mirror: to the run of its stage, each step once, at its number."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_recipes.backends import megatron_bridge, schemas
from nemotron_recipes.mirror import sync
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.mirror.offline import OfflineFile
from nemotron_recipes.mirror.telling import Teller
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.worker.trainer_wandb import TrainerRun, find_trainer_run
from tests.helpers.fake_wandb import KEY, FakeWandb
from tests.helpers.mirrored import a_run, wandb

pytest.importorskip("wandb")
__all__ = ["wandb"]

TRAINER = """
import sys, wandb
run = wandb.init(dir=None, name="my own name", config={"hidden_size": 8}, settings=wandb.Settings(silent=True))
first, end = map(int, sys.argv[1:])
for step in range(first, end):
    wandb.log({"lm loss": first / step, "large": "x" * 40_000, "spread": wandb.Histogram([1, 2])}, step)
    wandb.log({"learning-rate": 0.1, "answers": wandb.Table(["a"], [["b"]])}, step)
print("spoken on the console")
wandb.finish()
"""


# As transformers' WandbCallback and TRL's GRPO do: the SDK counts the calls, anew in each attempt.
UNNUMBERED = """
import sys, wandb
run = wandb.init(project="huggingface")
first, end = map(int, sys.argv[1:])
for step in range(first, end):
    wandb.log({"lm loss": first / step, "train/global_step": step})
    wandb.log({"answers": wandb.Table(["a"], [[f"answer {step}"]])})
"""


def trainer_logs(journal: Journal, first: int, end: int, script: str = TRAINER) -> TrainerRun:
    """What a trainer that opens a W&B run as Megatron-Bridge does leaves in the stage's folder, without any network."""
    found = find_trainer_run(RunDir(journal.run_dir).stage("sft"), "run-1", "sft")
    assert found is not None
    environ = {**os.environ, **found.environment, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "-c", script, str(first), str(end)], env=environ, check=True, timeout=300)
    return found


@pytest.mark.parametrize("cuts", [1, pytest.param(8, marks=pytest.mark.long)])
def test_a_trainers_own_logging_goes_to_the_run_of_its_stage(wandb: FakeWandb, tmp_path: Path, cuts: int) -> None:
    journal = a_run(tmp_path)
    found = trainer_logs(journal, 1, 5)
    trainer_logs(journal, 3, 8)  # a second attempt goes on from the checkpoint at step 2
    kept = [path for path in found.folder.rglob("*") if path.is_file()]
    assert kept and not any(KEY.encode() in path.read_bytes() for path in kept)
    assert not any(b"spoken on the console" in path.read_bytes() for path in kept)
    for cut in range(cuts):
        wandb.cut_at = 20 + 4 * cut
        sync.replay(journal.run_dir)
    wandb.cut_at = None
    assert sync.replay(journal.run_dir).left == 0
    told = wandb.runs["run-1.sft"]
    steps = [told.history[n]["_step"] for n in sorted(told.history)]
    assert steps == list(range(1, 8))
    losses = [told.history[n]["lm loss"] for n in sorted(told.history)]
    assert losses == [1.0, 0.5, *(3 / step for step in range(3, 8))], "of a step that is repeated the newest counts"
    assert not any("loss" in row for row in told.history.values()), "metrics.jsonl holds the same under other names"
    assert told.history[0]["spread"]["_type"] == "histogram" and told.history[0]["answers"]["_type"] == "table-file"
    assert {"lm loss", "learning-rate"} <= told.history[0].keys() and told.config["hidden_size"] == {"value": 8}
    assert told.summary["loss"] == 0.2 and told.exit_code == 0
    assert set(wandb.runs) == {"run-1.sft", "run-1.data-prep-sft"}
    assert ("made", "run-1.sft", "ModelArtifact-sft:v0") in wandb.edges()


def test_what_wandb_has_of_a_repeated_step_stays(wandb: FakeWandb, tmp_path: Path) -> None:
    """The first attempt was told before the second one came."""
    journal = a_run(tmp_path)
    trainer_logs(journal, 1, 6, UNNUMBERED)
    assert sync.replay(journal.run_dir).left == 0
    journal.started("sft", 2, [])
    found = trainer_logs(journal, 4, 9, UNNUMBERED)
    newest = sorted(found.folder.glob("wandb/offline-run-*"))[-1]
    next(newest.glob("files/media/table/answers_5_*")).unlink()
    journal.ended("sft", 2, "succeeded", 0, {"loss": 0.1})
    assert sync.replay(journal.run_dir).left == 0
    told = wandb.runs["run-1.sft"].history
    assert [told[n]["_step"] for n in sorted(told)] == list(range(1, 9))
    assert [told[n]["lm loss"] for n in sorted(told)] == [*(1 / n for n in range(1, 6)), *(4 / n for n in range(6, 9))]
    assert [told[n]["_step"] for n in sorted(told) if "answers" not in told[n]] == [6], "its file is gone"
    assert [entry.get("left_out") for entry in journal.done().values()][-1] == ["answers"], "and that is said"
    assert any(b"answer 8" in blob for blob in wandb.blobs.values())


def test_an_end_waits_for_the_trainers_last_words(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker notes its end first; then its process goes on for a moment, and the SDK writes."""
    journal = a_run(tmp_path)
    found = trainer_logs(journal, 1, 8)
    (file,) = found.folder.glob("wandb/offline-run-*/*.wandb")
    whole = file.read_bytes()
    growing, now = OfflineFile(file.with_name("growing")), 0
    for size in (3, 7, 100, 5_000, 40_000, 70_001, 70_002, len(whole)):  # read on while it grows, then at its end
        growing.path.write_bytes(whole[:size])
        now = len(growing.read(ended=False).rows)
    assert growing.logged == OfflineFile(file).read() and growing.logged.whole and now == 7
    growing.path.unlink()
    file.write_bytes(whole[: len(whole) * 6 // 10])
    part = OfflineFile(file).read()
    assert not part.whole and 1 < len(part.rows) < 7
    fake_sdk = type("FakeSdk", (), {"Api": lambda timeout: None})  # nothing is asked of it here
    assert journal.target is not None
    replay, end = Teller(fake_sdk, journal.run_dir, journal.target), journal.entries()[-1]
    assert replay._more_comes(end, alive=True) and replay._more_comes(end, alive=False), "it was changed just now"
    with monkeypatch.context() as patched:
        patched.setattr("nemotron_recipes.mirror.telling.QUIET_SECONDS", 0.0)
        assert not replay._more_comes(end, alive=False), "killed: no end will come"
    worker = subprocess.Popen(["sleep", "600"])
    follower = subprocess.Popen([sys.executable, "-m", sync.FOLLOWER, str(journal.run_dir), str(worker.pid)])
    try:
        until = time.monotonic() + 180
        while "output model:v1" not in journal.done() and time.monotonic() < until:
            time.sleep(0.05)
        assert "output model:v1" in journal.done() and follower.poll() is None
        while not wandb.runs["run-1.sft"].history and time.monotonic() < until:
            time.sleep(0.05)
        assert wandb.runs["run-1.sft"].history and not wandb.runs["run-1.sft"].complete, "the curve while it trains"
        file.write_bytes(whole)
        assert not replay._more_comes(end, alive=True)
        worker.kill()
        worker.wait()
        assert follower.wait(timeout=180) == 0
    finally:
        for process in (worker, follower):
            process.kill()
            process.wait()
    told = wandb.runs["run-1.sft"].history
    assert [told[n]["_step"] for n in sorted(told)] == list(range(1, 8))


def test_the_native_keys_are_keys_of_the_real_trainers(wandb: FakeWandb, tmp_path: Path) -> None:
    """Megatron-Bridge's LoggerConfig as it was read from the package; what `wandb.init` takes, where AutoModel goes."""
    import inspect

    import wandb as sdk

    journal = a_run(tmp_path)
    found = find_trainer_run(RunDir(journal.run_dir).stage("sft"), "run-1", "sft")
    assert found is not None
    for name in megatron_bridge.SCHEMAS:
        fields = schemas.load(name).fields
        assert all(f"logger.{key}" in fields for key in found.megatron_bridge()), name
    assert found.megatron_bridge()["wandb_exp_name"] == "run-1.sft", "an empty name is an error there"
    assert found.automodel().keys() <= inspect.signature(sdk.init).parameters.keys()
    settings = {name.removeprefix("WANDB_").lower() for name in found.environment} - {"name", "dir"}
    known = sdk.Settings.model_fields.keys()
    other = {"error_reporting", "run_group", "job_type", "run_id", "project", "entity", "resume", "mode"}
    other |= {"log_model", "watch"}  # transformers' own
    assert settings - other <= known, settings - other - known
    (journal.folder / "target.json").unlink()
    assert find_trainer_run(RunDir(journal.run_dir).stage("sft"), "run-1", "sft") is None
