"""The figures of trainers that write TensorBoard files, in metrics.jsonl: files as torch has written them."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.rundir import TRACKER, StageDir
from nemotron_recipes.spec import Artifact, Output
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.event_files import EventMetrics, masked_crc32c, scalars, whole_records
from nemotron_recipes.worker.megatron_bridge import stage
from nemotron_recipes.worker.megatron_bridge.config import Paths
from nemotron_recipes.worker.nemo_rl.stage import metric_of

RECORDED = Path(__file__).parents[1] / "recorded" / "tensorboard"  # its README.md says how they were made
(MEGATRON,) = (RECORDED / "megatron_bridge").iterdir()
(NEMO_RL,) = (RECORDED / "nemo_rl").iterdir()


@pytest.fixture
def context(tmp_path):
    folder = StageDir(tmp_path / "stage")
    folder.checkpoints.mkdir(parents=True)
    outputs = {"checkpoint": Output("checkpoint", "made", "checkpoint")}
    return Context(0, 1, 0, 1, folder, {"id": "r", "stage": "s"}, Store(tmp_path / "store"), outputs)


@pytest.fixture
def events(context):
    """The file that a trainer writes."""
    folder = context.dir.path / "tensorboard"
    folder.mkdir()
    return folder / MEGATRON.name


def megatron(context, start=0):
    folder = context.dir.path / "tensorboard"
    return EventMetrics(context, folder, stage._TAGS.get, start, 4)


def rows(context):
    return [json.loads(line) for line in context.dir.metrics.read_text().splitlines()]


def at(step, steps):
    return {"step": step, "steps": steps, "time": 1767225600.0 + step}


def told(number, loss):
    return at(number, 4) | {
        "lr": float(f"{number}e-05"),
        "loss": loss,
        "grad_norm": 0.5 * number,
        "seconds_per_step": 1.25,
    }


def validated(number, loss):
    return at(number, 4) | {"validation_loss": loss}


def since(number):
    """The file as an attempt writes it that begins with that step."""
    data = MEGATRON.read_bytes()
    at = 0
    for record in whole_records(data)[0]:
        if any(at_step == number for _, at_step, *_ in scalars(record)):
            return data[at:]
        at += 16 + len(record)
    raise AssertionError(number)


WHOLE = [told(1, 2.0), told(2, 1.0), validated(2, 1.5), told(3, None), told(4, 0.5), validated(4, 0.75)]


def test_megatron_bridges_figures_become_ours(context, events):
    with megatron(context) as metrics:
        shutil.copy(MEGATRON, events)
        metrics.look()
        assert rows(context) == WHOLE[:4], "more may come of the newest step"
    assert rows(context) == WHOLE
    assert context.results == {"loss": 0.5, "validation_loss": 0.75}


def test_nemo_rls_figures_become_ours(context):
    folder = context.dir.path / "nemo_rl" / "tensorboard"
    with EventMetrics(context, folder, metric_of, 0, 2):
        shutil.copytree(NEMO_RL.parent, folder)
    before, first, second = rows(context)
    assert before == at(0, 2) | {"validation_loss": 0.75, "validation_accuracy": 0.75}
    figures = {"loss": 0.7, "grad_norm": 1.5, "lr": 5e-07, "accuracy": 0.5}
    assert first == at(1, 2) | figures | {"tokens_per_second": 1000.0, "seconds_per_step": 4.0}
    assert (second["step"], second["loss"]) == (2, 0.35)
    assert metric_of("validation/accuracy") == "validation_accuracy", "GRPO"
    assert metric_of("timing/validation/total_validation_time") is None


def test_a_file_that_grows_is_read_up_to_its_last_whole_record(context, events, capsys):
    data = MEGATRON.read_bytes()
    with megatron(context) as metrics:
        for end in range(0, len(data), 7):
            events.write_bytes(data[:end])
            metrics.look()
        events.write_bytes(data)
    assert rows(context) == WHOLE
    assert not capsys.readouterr().err


def test_a_damaged_file_is_said_and_ends_no_training(context, events, capsys):
    data = bytearray(MEGATRON.read_bytes())
    data[-30] ^= 1
    with megatron(context):
        events.write_bytes(data)
    assert rows(context) == WHOLE
    assert "can't be read after" in capsys.readouterr().err
    records, size = whole_records(bytes(8) * 8)  # a network file system may show a file longer than what it has of it
    assert (records, size) == ([], 0)


def test_the_next_attempt_tells_what_was_left_untold_and_forgets_what_is_done_again(context, events):
    shutil.copy(MEGATRON, events)
    context.dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in WHOLE[:1]))
    with megatron(context, start=2) as metrics:
        assert rows(context) == WHOLE[:3]
        events.with_name(events.name.replace("1795285903", "1795285904")).write_bytes(since(3))
        metrics.look()
    assert rows(context) == WHOLE
    with megatron(context, start=1):
        assert rows(context) == WHOLE[:1]
    assert rows(context) == WHOLE[:1]


def test_another_rank_writes_nothing(context, events):
    context.rank = 1
    shutil.copy(MEGATRON, events)
    with megatron(context):
        pass
    assert not context.dir.metrics.exists()


def test_what_tensorboardx_writes_is_read(tmp_path):
    tensorboardx = pytest.importorskip("tensorboardX")
    writer = tensorboardx.SummaryWriter(str(tmp_path))
    writer.add_scalar("train/loss", 0.25, 1 << 40, walltime=3.5)
    writer.close()
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    records, size = whole_records(data)
    assert size == len(data)
    assert [found for record in records for found in scalars(record)] == [(3.5, 1 << 40, "train/loss", 0.25)]


def test_the_checksum_is_that_of_the_standard():
    crc = 0xE3069283  # CRC-32C of "123456789", RFC 3720's check value
    assert masked_crc32c(b"123456789") == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_where_a_run_goes_on_is_where_its_figures_do(context, tmp_path):
    events, there = tmp_path / "none", tmp_path / "there"
    (there / "iter_0000007").mkdir(parents=True)
    (there / TRACKER).write_text("7\n")
    base = {"data": tmp_path, "tokenizer": "t"}
    for paths, kept in (
        (Paths(**base), 0),
        (Paths(**base, load=there), 7),
        (Paths(**base, load=there, load_step=3), 3),
    ):
        context.dir.metrics.write_text("".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in range(1, 10)))
        stage.follow(events, {"train_iters": 10}, context, paths)
        assert len(rows(context)) == kept


def test_a_stage_of_megatron_bridge_leaves_metrics(context, events, monkeypatch, tmp_path):
    """With a fake of its training function, which leaves a checkpoint and such a file."""

    def train(native, forward_step):
        shutil.copy(MEGATRON, native)
        (context.dir.checkpoints / "iter_0000004").mkdir()
        (context.dir.checkpoints / TRACKER).write_text("4\n")

    for name, made in (("gpt_step", {"forward_step": None}), ("finetune", {"finetune": train})):
        module = types.ModuleType(name)
        vars(module).update(made)
        monkeypatch.setitem(sys.modules, f"megatron.bridge.training.{name}", module)
    for name in ("megatron", "megatron.bridge", "megatron.bridge.training"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(stage, "build_config", lambda recipe, method, pack, overrides, paths: events)
    for key in ("model.path", "data.path"):
        context.artifacts[key], context.inputs[key] = Artifact("path", "data", uri=str(tmp_path)), tmp_path
    plan = tmp_path / "megatron.yaml"
    plan.write_text(f"logger: {{tensorboard_dir: {events.parent}}}\n")
    given = {"method": "sft", "recipe": {}, "pack_size": 8, "train_iters": 4, "resume_from": None}
    stage.run({**given, "config": str(plan)}, context)
    assert rows(context) == WHOLE
    assert context.results == {"loss": 0.5, "validation_loss": 0.75, "step": 4}
