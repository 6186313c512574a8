"""The automodel worker, without AutoModel: its checkpoints in our layout, our packs in its terms, its command line."""

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.data.packed import COLUMNS
from nemotron_recipes.errors import JobFailed, UserError
from nemotron_recipes.rundir import TRACKER, StageDir, latest_checkpoint
from nemotron_recipes.spec import Artifact, Output
from nemotron_recipes.worker.automodel import stage
from nemotron_recipes.worker.automodel.checkpoints import adopt, clear_unfinished, to_resume
from nemotron_recipes.worker.automodel.metrics import Metrics
from nemotron_recipes.worker.automodel.packs import PackedTensors
from nemotron_recipes.worker.context import Context


def save(root, step, files=("model/consolidated/config.json",)):
    """As AutoModel does after step number `step`, counted from 0: the folder, then LATEST."""
    folder = root / f"epoch_0_step_{step}"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    latest = root / "LATEST"
    latest.unlink(missing_ok=True)
    latest.symlink_to(folder.name)


def test_its_checkpoints_get_our_layout(tmp_path):
    assert adopt(tmp_path, keep=2) is None
    for step in (1, 3, 5):
        save(tmp_path, step)
        assert adopt(tmp_path, keep=2) == latest_checkpoint(tmp_path)
    assert (tmp_path / TRACKER).read_text() == "6\n"
    assert sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_0000004", "iter_0000006"]
    assert sorted(p.name for p in tmp_path.glob("epoch_*")) == ["epoch_0_step_3", "epoch_0_step_5"]
    assert adopt(tmp_path, keep=2).resolve().name == "epoch_0_step_5"


def test_half_a_checkpoint_is_never_adopted_and_makes_room(tmp_path):
    save(tmp_path, 1)
    adopt(tmp_path, keep=2)
    (tmp_path / "epoch_0_step_3").mkdir()  # killed while it saved
    assert adopt(tmp_path, keep=2).name == "iter_0000002"
    clear_unfinished(tmp_path)
    assert [p.name for p in tmp_path.glob("epoch_*")] == ["epoch_0_step_1"]


def test_where_a_file_system_has_no_links_latest_is_a_text(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "LATEST").unlink()
    (tmp_path / "LATEST.txt").write_text("epoch_0_step_1")
    assert adopt(tmp_path, keep=1).name == "iter_0000002"


def test_what_it_continues_from(tmp_path):
    save(tmp_path, 1)
    own = adopt(tmp_path, keep=2)
    assert to_resume(None, tmp_path, attempt=1) is None
    assert to_resume(None, tmp_path, attempt=2).name == "epoch_0_step_1"
    assert to_resume(str(own), tmp_path / "other", attempt=1).name == "epoch_0_step_1"
    with pytest.raises(UserError, match="isn't a whole checkpoint"):
        to_resume(str(tmp_path), tmp_path / "other", attempt=1)


def test_packs_become_its_tensors(tmp_path):
    columns = {
        "input_ids": [5, 6, 7, 8, 9, 10],
        "loss_mask": [0, 1, 1, 0, 1, 0],
        "seq_start_id": [0, 4],
        "pack_offsets": [0, 6],
        "seq_offsets": [0, 2],
    }
    (tmp_path / "train").mkdir()
    for name, values in columns.items():
        np.save(tmp_path / "train" / f"{name}.npy", np.array(values, dtype=COLUMNS[name]))
    packs = PackedTensors(str(tmp_path), "train", pack_size=8)
    assert len(packs) == 1
    assert packs[0] == {
        "input_ids": [5, 6, 7, 8, 9, 10, 0, 0],
        "labels": [-100, 7, 8, -100, 10, -100, -100, -100],  # of the next token, where it is learned
        "position_ids": [0, 1, 2, 3, 0, 1, 0, 1],
        "seq_lens": [4, 2, 2],
        "seq_lens_padded": [4, 2, 2],
    }
    with pytest.raises(ValueError, match="pack 0 has 6 tokens, more than 4"):
        PackedTensors(str(tmp_path), "train", pack_size=4)[0]


@pytest.fixture
def context(tmp_path):
    made = Context(
        *(0, 1, 0, 1, StageDir(tmp_path / "stage"), {"id": "r", "stage": "s"}, Store(tmp_path / "store")),
        {"model": Output("model", "made", "model"), "adapter": Output("adapter", "made", "adapter")},
    )
    made.artifacts["model.path"] = Artifact("hub", "model", "ORG/NAME", revision="c0ffee")
    made.artifacts["data.path"] = Artifact("path", "data", uri="/data/rows")
    made.inputs["data.path"] = Path("/data/rows")
    made.dir.checkpoints.mkdir(parents=True)
    return made


CONFIG = {
    "config": "/r/s/automodel.yaml",
    "pack_size": 64,
    "train_iters": 4,
    "keep": 2,
    "adapters": False,
    "data_keys": ["dataset.path", "validation_dataset.path"],
}


def test_what_is_known_only_here_goes_to_its_command_line(context):
    assert stage.arguments(CONFIG, context, Path("/old/epoch_0_step_3")) == [
        "/r/s/automodel.yaml",
        "--model.pretrained_model_name_or_path=ORG/NAME",
        "--model.revision=c0ffee",
        "--checkpoint.restore_from=/old/epoch_0_step_3",
        "--dataset.path=/data/rows",
        "--dataset.pack_size=64",
        "--validation_dataset.path=/data/rows",
        "--validation_dataset.pack_size=64",
    ]


def test_a_data_set_of_its_own_gets_the_pinned_folder(context, monkeypatch):
    asked = []

    def snapshot_download(name, **how):
        asked.append((name, how))
        return "/cache/snapshot"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    keys = ["dataset.path_or_dataset", "validation_dataset.path_or_dataset"]
    context.artifacts["data.path"] = Artifact("hub", "data", "rowan/hellaswag", revision="beef")
    del context.inputs["data.path"]
    told = stage.arguments({**CONFIG, "data_keys": keys}, context, None)
    assert told[-2:] == [f"--{key}=/cache/snapshot" for key in keys]
    assert asked == [("rowan/hellaswag", {"repo_type": "dataset", "revision": "beef"})]
    context.inputs["data.path"] = Path("/mine")  # a folder in its place
    assert stage.arguments({**CONFIG, "data_keys": keys}, context, None)[-1] == f"--{keys[1]}=/mine"


def test_a_checkpoint_that_was_saved_right_before_the_end_is_kept(context, fake_automodel):
    """Killed after LATEST was written and before it had our name: the next attempt continues from it."""
    root = context.dir.checkpoints
    save(root, 1)
    adopt(root, keep=2)
    save(root, 2)
    (root / "epoch_0_step_9").mkdir()  # and half of another one
    context.attempt = 2
    fake_automodel["steps"] = [3]
    stage.run({**CONFIG, "resume_from": None}, context)
    assert f"--checkpoint.restore_from={root}/epoch_0_step_2" in fake_automodel["argv"]
    assert sorted(p.name for p in root.glob("iter_*")) == ["iter_0000003", "iter_0000004"]
    assert not (root / "epoch_0_step_9").exists()


@pytest.fixture
def fake_automodel(context, monkeypatch):
    """A fake of AutoModel's entry: it saves after the steps that the test names."""
    told = {}

    def run_module(name, run_name, alter_sys):
        told["argv"] = list(sys.argv)
        for step in told["steps"]:
            save(context.dir.checkpoints, step, told.get("files", ("model/consolidated/config.json",)))

    monkeypatch.setitem(sys.modules, "nemo_automodel", types.ModuleType("nemo_automodel"))
    monkeypatch.setattr(stage, "entry", lambda: stage.ENTRIES[0])
    monkeypatch.setattr(runpy, "run_module", run_module)
    return told


def test_the_last_checkpoint_becomes_the_output(context, fake_automodel):
    fake_automodel["steps"] = [1, 3]
    stage.run({**CONFIG, "resume_from": None}, context)
    assert fake_automodel["argv"][:2] == ["nemo_automodel.cli.app", "/r/s/automodel.yaml"]
    assert (context.output("model") / "config.json").read_text() == "{}"
    assert context.results == {"step": 4}


def test_a_model_that_was_not_written_is_a_failure(context, fake_automodel):
    fake_automodel |= {"steps": [3], "files": ("model/other",)}
    with pytest.raises(JobFailed, match=r"holds no config\.json"):
        stage.run({**CONFIG, "resume_from": None}, context)


def lines(*rows):
    return "".join(json.dumps({"epoch": 0, "timestamp": "2026-01-01T00:00:00.500Z", **row}) + "\n" for row in rows)


def test_its_metrics_become_ours_and_steps_done_again_are_forgotten(context):
    root, ours = context.dir.checkpoints, context.dir.metrics
    ours.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step": 3, "loss": 2.4}\n')
    (root / "training.jsonl").write_text(lines({"step": 0, "loss": 3.0}))  # of the attempt before
    metrics = Metrics(context, start=2, steps=4)
    with open(root / "training.jsonl", "a") as out:
        out.write(lines({"step": 2, "loss": 2.2, "lr": 0.1, "tps": 5.0, "mem": 1.0}) + '{"step": 3, "lo')
    (root / "validation.jsonl").write_text(lines({"step": 2, "val_loss": 2.1}) + "no JSON\n")
    metrics.look()
    metrics.look()
    rows = [json.loads(line) for line in ours.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert rows[2] == {
        "step": 3,
        "steps": 4,
        "time": 1767225600.5,
        "loss": 2.2,
        "lr": 0.1,
        "tokens_per_second": 5.0,
    }
    assert context.results == {"loss": 2.2, "validation_loss": 2.1}


def test_training_that_ends_early_is_a_failure(context, fake_automodel):
    fake_automodel["steps"] = [1]
    with pytest.raises(JobFailed, match="after step 2 of 4"):
        stage.run({**CONFIG, "resume_from": None}, context)
