"""Digests of checkpoints in the layout of every backend: what has changed since it was saved is named before use."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nemotron_recipes import checkpoints
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import JobFailed, UserError
from nemotron_recipes.rundir import DEADLINE_ENV, RANKS_HERE_ENV, TRACKER, Damaged, StageDir, read_jsonl
from nemotron_recipes.spec import Artifact
from nemotron_recipes.worker import sealing
from nemotron_recipes.worker.automodel import checkpoints as automodel
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.converting import checkpoint_folder
from nemotron_recipes.worker.megatron_bridge import stage as megatron
from nemotron_recipes.worker.nemo_rl import checkpoints as nemo_rl
from nemotron_recipes.worker.sealing import Sealing, given_checkpoint, own_newest, require_unchanged
from nemotron_recipes.worker.trl import checkpoints as trl

# What lies in a checkpoint of each, as their sources write it; one file of each is hidden, empty, or in a folder.
FILES = {
    "trl": ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors", "rng_state.pth"),
    "megatron_bridge": (".metadata", "__0_0.distcp", "common.pt", "metadata.json", "run_config.yaml", "train_state.pt"),
    "automodel": ("model/consolidated/config.json", "model/.metadata", "optim/__0_0.distcp", "step_scheduler.pt"),
    "nemo_rl": ("training_info.json", "config.yaml", "policy/weights/.metadata", "policy/weights/__0_0.distcp"),
}


def save(backend: str, root: Path, step: int) -> Path:
    """A whole checkpoint under the name that all backends have, its digests not yet read but for trl's."""
    own = {"trl": f".staging/checkpoint-{step}", "automodel": f"epoch_0_step_{step - 1}", "nemo_rl": f"step_{step}"}
    folder = root / own.get(backend, f"iter_{step:07d}")
    for name in FILES[backend]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of step {step}")
    if backend == "trl":
        return trl.commit_checkpoint(root, step, keep=2)
    if backend == "automodel":
        (root / "LATEST").unlink(missing_ok=True)
        (root / "LATEST").symlink_to(folder.name)
        found = automodel.adopt(root, keep=2)
    elif backend == "nemo_rl":
        found = nemo_rl.adopt(root)
    else:
        (root / TRACKER).write_text(str(step))
        shutil.copy(folder / "train_state.pt", root / megatron.STATE)
        found = folder
    assert found is not None
    return found


def context_of(folder: Path, rank: int = 0, world: int = 1, attempt: int = 1) -> Context:
    stage = StageDir(folder / "run" / "stage")
    stage.checkpoints.mkdir(parents=True, exist_ok=True)
    return Context(rank, world, rank, attempt, stage, {"id": "r", "stage": "s"}, Store(folder / "store"), {})


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setattr(sealing, "QUIET", 0.0)
    monkeypatch.delenv(DEADLINE_ENV, raising=False)
    return context_of(tmp_path)


def sealed(backend: str, context: Context, *steps: int) -> list[Path]:
    """Saved one after another while a trainer runs."""
    with Sealing(context) as reading:
        found = [save(backend, context.dir.checkpoints, step) for step in steps]
        for folder in found if backend != "trl" else []:
            reading.saw(folder)
    return found


def spoilt(folder: Path) -> list[tuple[str, Callable[[], object]]]:
    """(the file that has to be named, what is done to it) for each file and each kind of damage."""
    done: list[tuple[str, Callable[[], object]]] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != checkpoints.DIGESTS):
        whole = path.read_bytes()
        for text in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1], b"", whole + b"\0"):
            done.append((path.name, lambda path=path, text=text: path.write_bytes(text)))
        done.append((path.name, path.unlink))
    done.append(("rng_state_9.pth", lambda: (folder / "rng_state_9.pth").write_text("came later")))
    return done


@pytest.mark.parametrize("backend", FILES)
def test_whatever_changes_in_a_checkpoint_is_named(context: Context, backend: str) -> None:
    older, folder = sealed(backend, context, 2, 4)
    assert checkpoints.is_read(older) and checkpoints.is_read(folder)
    spare = context.dir.path / "spare"
    shutil.copytree(folder, spare)
    for name, damage in spoilt(folder.resolve()):
        damage()
        with pytest.raises(Damaged, match=name) as told:
            require_unchanged(context, folder)
        assert f"checkpoint.load={older}" in str(told.value)
        assert [str(error) for error in checkpoints.changed(context.dir.checkpoints)] == [str(told.value)]
        shutil.rmtree(folder.resolve())
        shutil.copytree(spare, folder.resolve())
    require_unchanged(context, folder)
    assert list(read_jsonl(context.dir.events(1, 0)))[-1]["known"] == "digests"
    known = folder / checkpoints.DIGESTS if backend == "trl" else checkpoints.beside_of(folder)
    whole = known.read_bytes()
    for text in (whole.replace(b"sha256:", b"sha255:", 1), whole[:-9], b""):
        known.write_bytes(text)
        with pytest.raises(Damaged, match=known.name):
            require_unchanged(context, folder)
    known.unlink()
    require_unchanged(context, folder)
    assert list(read_jsonl(context.dir.events(1, 0)))[-1]["known"] == "nothing"
    assert checkpoints.unread(context.dir.checkpoints) == [folder]


@pytest.mark.parametrize(
    ("mutant", "instead"),
    [
        ("checkpoints.check_mark", lambda *_, **__: None),
        ("checkpoints.mark", lambda path, each: [path.stat().st_size, ""]),
        ("checkpoints._names", lambda folder: {"train_state.pt"}),
        ("checkpoints._read", lambda folder: None),
        ("rundir.digest_of_start", lambda *_: "sha256:always the same"),
        ("worker.sealing.Sealing.saw", lambda *_: None),
    ],
    ids=lambda mutant: mutant if isinstance(mutant, str) else "",
)
def test_a_removed_check_is_noticed(
    context: Context, monkeypatch: pytest.MonkeyPatch, mutant: str, instead: Callable[..., object]
) -> None:
    monkeypatch.setattr(f"nemotron_recipes.{mutant}", instead)
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_whatever_changes_in_a_checkpoint_is_named(context, "megatron_bridge")


class Held:
    """Reading waits at its first piece until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun, self.go_on, real = threading.Event(), threading.Event(), checkpoints.mark

        def mark(path: Path, each: Callable[[], None]) -> list[object]:
            self.begun.set()
            assert self.go_on.wait(120)
            return real(path, each=each)

        monkeypatch.setattr(checkpoints, "mark", mark)


def test_a_checkpoint_may_go_while_it_is_read(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    root, held = context.dir.checkpoints, Held(monkeypatch)
    with Sealing(context) as reading:
        reading.saw(save("megatron_bridge", root, 2))
        assert held.begun.wait(120)
        newest = save("megatron_bridge", root, 4)
        shutil.rmtree(root / "iter_0000002")  # as a trainer does: nothing of ours may lie in its way
        held.go_on.set()
        reading.saw(newest)
    assert checkpoints.is_read(newest)
    with Sealing(context):  # the next attempt
        pass
    assert list((root / checkpoints.BESIDE).iterdir()) == [checkpoints.beside_of(newest)]


def test_megatron_bridge_finds_nothing_but_checkpoints_to_remove(context: Context) -> None:
    """As its `cleanup_old_non_persistent_checkpoint` does after each save: any other name ends the training."""
    sealed("megatron_bridge", context, 2, 4)
    found = sorted(context.dir.checkpoints.rglob("iter_*"), key=lambda path: int(path.name[len("iter_") :]))
    assert [path.name for path in found] == ["iter_0000002", "iter_0000004"]


def test_a_file_that_comes_while_it_is_read_is_read_too(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Bridge writes run_config.yaml after the tracker."""
    held = Held(monkeypatch)
    with Sealing(context) as reading:
        folder = save("megatron_bridge", context.dir.checkpoints, 2)
        reading.saw(folder)
        assert held.begun.wait(120)
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text("{}")
        held.go_on.set()
    require_unchanged(context, folder)
    (folder / "tokenizer" / "vocab.json").write_text("[]")
    with pytest.raises(Damaged, match=r"vocab\.json"):
        require_unchanged(context, folder)


@pytest.mark.parametrize("end", ["failed", "asked to end", "no time left"])
def test_who_has_to_end_leaves_lengths_and_the_next_attempt_reads_on(
    context: Context, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    folder = save("megatron_bridge", context.dir.checkpoints, 2)
    held, reading = Held(monkeypatch), Sealing(context)
    if end == "no time left":
        monkeypatch.setenv(DEADLINE_ENV, "1000.0")
    with suppress(JobFailed), reading:
        assert held.begun.wait(120), "what was not read is wanted from the beginning"
        context.stop_seen, context.time_is_up = end != "failed", end == "no time left"
        threading.Thread(target=lambda: (_until(lambda: reading._stopped), held.go_on.set())).start()
        if end == "failed":
            raise JobFailed("it ended by itself")
    monkeypatch.delenv(DEADLINE_ENV, raising=False)
    assert not checkpoints.is_read(folder)
    (shard := folder / "__0_0.distcp").write_text(shard.read_text().upper())
    (folder / "tokenizer.json").write_text("its trainer was still writing small files")
    (folder / "run_config.yaml").write_text("longer than what was there when the lengths were noted")
    require_unchanged(context, folder)
    assert list(read_jsonl(context.dir.events(1, 0)))[-1]["known"] == "lengths"
    shard.write_text("cut")
    with pytest.raises(Damaged, match="__0_0.distcp is damaged: of its"):
        require_unchanged(context, folder)
    shard.write_text("__0_0.distcp of step 2")
    context.stop_seen = False
    with Sealing(context):
        pass
    assert checkpoints.is_read(folder)


def test_a_signal_while_the_end_waits_ends_the_reading(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a module that asks whether it shall stop, as NeMo-RL's: no Cancelled is raised there."""
    folder, held = save("megatron_bridge", context.dir.checkpoints, 2), Held(monkeypatch)
    with Sealing(context):
        assert held.begun.wait(120)
        context.stop_signal = True
        held.go_on.set()
    assert not checkpoints.is_read(folder)


def _until(true: Callable[[], bool]) -> None:
    while not true():
        threading.Event().wait(0.01)


def test_ranks_share_the_reading(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = sealed("megatron_bridge", context, 2)
    ranks = [context_of(tmp_path, rank, 3) for rank in range(3)]
    for name in FILES["megatron_bridge"]:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole.upper())
        refused = 0
        for rank in ranks:
            try:
                require_unchanged(rank, folder)
            except Damaged:
                refused += 1
        assert refused == 1, name
        with pytest.raises(Damaged):
            require_unchanged(ranks[0], folder, alone=True)
        with pytest.MonkeyPatch.context() as two_hosts:  # the other ranks have copies
            two_hosts.setenv(RANKS_HERE_ENV, "1")
            with pytest.raises(Damaged):
                require_unchanged(ranks[0], folder)
            require_unchanged(ranks[1], folder)
        (folder / name).write_bytes(whole)


def test_megatron_unpickles_the_state_of_the_checkpoint_that_was_looked_at(context: Context) -> None:
    root = context.dir.checkpoints
    folder = sealed("megatron_bridge", context, 2, 4)[-1]
    context.attempt = 2
    context.artifacts["model.path"] = context.artifacts["data.path"] = None  # type: ignore[assignment]
    context.inputs |= {"model.path": Path("/m"), "data.path": Path("/d")}
    for text in ("of another one", "of step 4"):
        (root / megatron.STATE).write_text(text)
        assert megatron.find_paths({"resume_from": None}, context).load == root
        assert (root / megatron.STATE).read_text() == "train_state.pt of step 4"
    (folder / "common.pt").write_text("other")
    with pytest.raises(Damaged, match=r"common\.pt"):
        megatron.find_paths({"resume_from": None}, context)
    with pytest.raises(Damaged, match=r"common\.pt"):
        megatron.find_paths({"resume_from": str(folder)}, context_of(context.dir.path.parent.parent))
    context.inputs["checkpoint.pretrained_checkpoint"] = root
    with pytest.raises(Damaged, match=r"common\.pt"):
        megatron.find_paths({"resume_from": None}, context_with(context, attempt=1))
    (root / TRACKER).write_text("3")
    with pytest.raises(UserError, match="is missing"):
        own_newest(root)


def context_with(context: Context, attempt: int) -> Context:
    context.attempt = attempt
    return context


def test_megatron_goes_on_from_a_checkpoint_alone_and_never_anew(context: Context, tmp_path: Path) -> None:
    """As a container sees one, or a copy: without a tracker file beside it Megatron-Bridge would not look for any."""
    shutil.copytree(save("megatron_bridge", context.dir.checkpoints, 4), copy := tmp_path / "copy" / "iter_0000004")
    context.artifacts["model.path"] = context.artifacts["data.path"] = Artifact("path", "data", uri="/d")
    context.inputs |= {"model.path": Path("/m"), "data.path": Path("/d")}
    for _ in ("an attempt", "the next one, with nothing saved"):
        shutil.rmtree(context.dir.checkpoints, ignore_errors=True)
        paths = megatron.find_paths({"resume_from": str(copy)}, context)
        assert paths.load is not None and paths.load_step == 4
        assert (paths.load / TRACKER).read_text().strip() == "4"
        assert (paths.load / copy.name / "common.pt").samefile(copy / "common.pt")
        context.attempt = 2
    with pytest.raises(UserError, match="there is no checkpoint"):
        megatron.find_paths({"resume_from": str(copy.parent)}, context)
    version = paths.load  # one of the store has its checkpoint below a tracker file
    assert given_checkpoint(str(version)) == version / copy.name
    context.inputs[megatron.BASE] = copy.parent
    with pytest.raises(UserError, match="no whole checkpoint at"):
        megatron.find_paths({"resume_from": None}, context)
    shutil.copy(copy / "train_state.pt", copy.parent / megatron.STATE)
    assert megatron.find_paths({"resume_from": None}, context).pretrained == copy.parent
    context.inputs[megatron.BASE] = copy  # so planning names it
    (copy.parent / megatron.STATE).unlink()
    base = megatron.find_paths({"resume_from": None}, context).pretrained
    assert base is not None and (base / copy.name / "common.pt").samefile(copy / "common.pt")
    assert (base / megatron.STATE).read_bytes() == (copy / "train_state.pt").read_bytes()


@pytest.mark.parametrize(("source", "known"), [("store", []), ("path", ["nothing", "nothing"])])
def test_nothing_is_said_of_a_version_of_the_store(context: Context, source: str, known: list[str]) -> None:
    """It was compared as a whole already; a folder of somebody's may carry digests or not."""
    folder = save("megatron_bridge", context.dir.checkpoints, 2)
    for key in ("checkpoint.path", megatron.BASE, "model.path", "data.path"):
        context.inputs[key] = context.dir.checkpoints
        context.artifacts[key] = Artifact(source, "checkpoint", name="made", version=1)
    assert checkpoint_folder(context, "path") == folder
    assert megatron.find_paths({"resume_from": None}, context).pretrained == folder.parent
    assert [event["known"] for event in read_jsonl(context.dir.events(1, 0))] == known


def test_steps_that_are_done_again_are_saved_anew(context: Context) -> None:
    """Somebody has set the tracker back: what was known of later ones would not fit what is written now."""
    root = context.dir.checkpoints
    sealed("megatron_bridge", context, 2, 4)
    (root / TRACKER).write_text("2")
    with Sealing(context):
        (root / "iter_0000004" / "common.pt").write_text("new")
        assert checkpoints.check(root / "iter_0000004") is None
        assert checkpoints.check(root / "iter_0000002") is not None
    os.rename(root / "iter_0000002", root / "elsewhere")
    assert [folder.name for folder in checkpoints.unread(root)] == ["iter_0000004"]
