"""Every change that a commit makes fails in turn, in each way: what was acknowledged is whole, the rest whole or not.

Store, run record, journal, quarantine, the end of a run and checkpoints; then mutants of the code, which these same
checks must catch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron_recipes import checkpoints, closing
from nemotron_recipes.artifacts import contents, gc, staging
from nemotron_recipes.artifacts import store as store_module
from nemotron_recipes.artifacts.stages import read_events
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.cli.main import main
from nemotron_recipes.errors import UserError
from nemotron_recipes.executors.remote import there
from nemotron_recipes.fsio import files_below, tree_digest
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.rundir import RunDir, StageDir, append_event, latest_checkpoint, read_json, write_record
from nemotron_recipes.spec import Producer
from nemotron_recipes.worker.trl.checkpoints import commit_checkpoint, quarantine, staging_folder
from tests.helpers.faults import FAULTS, in_child
from tests.unit.test_store_crashes import (
    test_everything_is_durable_before_it_is_acknowledged as everything_is_durable,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def register(store: Store, text: str, producer: Producer | None = None) -> str:
    staged = store.stage("rows")
    try:
        (staged.content / "deep").mkdir()
        (staged.content / "deep" / "a.txt").write_text(text)
        return str(store.commit(staged, kind="data", producer=producer).version)
    except OSError:
        store.discard(staged)
        raise


def everywhere(work: Callable[[int], str], check: Callable[[int, str | None], None], fault: str, least: int) -> None:
    """Run `work(step)` with the fault at step 1, 2, 3, ... until it comes through unhurt; `check` after each."""
    for step in range(1, 500):
        said, changes = in_child(lambda step=step: work(step), step, fault)  # type: ignore[misc]
        check(step, said)
        if changes < step:
            assert step > least, "the faults have to reach into it"
            assert said is not None
            return
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_version_is_whole_or_absent(tmp_path: Path, fault: str) -> None:
    store = Store(tmp_path)

    def check(step: int, said: str | None) -> None:
        versions = store.versions("rows")
        assert versions == list(range(1, len(versions) + 1)), f"step {step}: numbers are contiguous"
        assert said is None or int(said) == versions[-1], f"step {step}: acknowledged, but not there"
        if versions:
            newest = store.resolve(f"rows:v{versions[-1]}")
            store.verify(newest)
            assert (store.content(newest).parent / contents.FILES).is_file(), f"step {step}"
            producer = Producer(f"f{step}", "r", "s", "data")
            found = store.find_output(producer)
            assert found is None or found.version == newest.version, f"step {step}"
        before = sorted(str(path) for path in files_below(tmp_path))
        assert store.versions("rows") == versions
        assert sorted(str(path) for path in files_below(tmp_path)) == before, "looking repairs nothing"
        staging.clean(tmp_path, time.time())
        for left in (tmp_path / ".staging").glob("*"):
            shutil.rmtree(left)  # of a child that could not say who it is: goes by age

    everywhere(lambda step: register(store, f"{step}", Producer(f"f{step}", "r", "s", "data")), check, fault, least=25)
    assert register(store, "after all that") == str(len(store.versions("rows")))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_record_is_the_old_one_or_the_new_one(tmp_path: Path, fault: str) -> None:
    stage = StageDir(tmp_path)
    write_record(stage, {"attempt": 0, "text": "x" * 5000})

    def work(step: int) -> str:
        write_record(stage, {"attempt": step, "text": "x" * 5000})
        return str(step)

    def check(step: int, said: str | None) -> None:
        record = read_json(stage.record)
        assert record is not None and len(record["text"]) == 5000
        assert record["attempt"] == step if said else record["attempt"] <= step

    everywhere(work, check, fault, least=4)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_journal_loses_nothing_that_it_acknowledged(tmp_path: Path, fault: str) -> None:
    journal = Journal(tmp_path)
    acknowledged: list[str] = []

    def work(step: int) -> str:
        journal.output("sft", "model", "model", step)
        journal.acknowledge(f"output model:v{step}", wandb="x")
        return f"output model:v{step}"

    def check(step: int, said: str | None) -> None:
        acknowledged.extend([said] if said else [])
        journal.output("sft", "model", "next", step)  # whoever comes next is not swallowed by what the last one left
        acknowledged.append(f"output next:v{step}")
        keys = [entry["key"] for entry in journal.entries()]
        assert [key for key in keys if key in acknowledged] == acknowledged
        assert set(journal.done()) <= set(keys), "told before it was noted"

    everywhere(work, check, fault, least=4)


@pytest.mark.parametrize("fault", FAULTS)
def test_quarantine_never_loses_a_version(tmp_path: Path, fault: str) -> None:
    store = Store(tmp_path)
    for text in ("old", "new"):
        register(store, text)
    old = store.resolve("rows:v1")
    item = gc.Item("rows:v1", str(tmp_path / "rows/v1"), 1, "")

    def work(step: int) -> str:
        moved, left = gc.quarantine(tmp_path, [item], 1.0)
        if left:
            raise OSError(5, left[0].why)
        return str(len(moved))

    def check(step: int, said: str | None) -> None:
        held = gc.quarantined(tmp_path)
        assert (1 in store.versions("rows")) != bool(held), f"step {step}: in one place, and in one only"
        if held:
            gc.restore(tmp_path, "rows:v1")
        store.verify(old)

    everywhere(work, check, fault, least=6)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_end_of_a_run_notes_what_is_there_or_nothing(tmp_path: Path, fault: str) -> None:
    """A log that goes on between the attempts to note it: no digest may be of something else than what is there."""
    run = RunDir(tmp_path)
    log = run.stage("sft").log(1, 0)
    log.parent.mkdir(parents=True)

    def work(step: int) -> str:
        closing.end(run, "finished", turn=step)
        return str(step)

    def check(step: int, said: str | None) -> None:
        with open(log, "a") as more:
            more.write(f"line {step}\n")
        told = [event.get("turn") for event in read_events(run.events)]
        assert said is None or told[-1] == step
        assert list(closing.changed(run)) == [], f"step {step}"

    everywhere(work, check, fault, least=4)
    assert read_json(run.path / closing.CLOSED) is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_is_whole_with_its_digests_or_not_there(tmp_path: Path, fault: str) -> None:
    """Our own, and one of a trainer that is given digests: what is known of it is never of another state of it."""
    own, other = tmp_path / "own", tmp_path / "other" / "iter_0000001"
    other.mkdir(parents=True)
    for name in ("a", "b"):
        (other / name).write_text("x" * 100)

    def work(step: int) -> str:
        checkpoints.seal_beside(other)
        commit_checkpoint(own, step, keep=2)
        return str(step)

    def prepare(step: int) -> None:
        folder = staging_folder(own) / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors"):
            (folder / name).write_text(f"{step}" * 100)

    def check(step: int, said: str | None) -> None:
        newest = latest_checkpoint(own)
        assert said is None or (newest is not None and newest.name == f"iter_{step:07d}")
        found = None if newest is None else checkpoints.check(newest)
        assert newest is None or (found is not None and not found.unread), f"step {step}"
        assert list(checkpoints.changed(other.parent)) == [], f"step {step}"
        quarantine(own)
        prepare(step + 1)

    prepare(1)
    everywhere(work, check, fault, least=12)
    assert checkpoints.is_read(other)


def test_a_new_file_of_events_is_in_its_folder_before_anything_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ext4 keeps a new name with its file; others may not."""
    forced, real = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (forced.add(os.fstat(fd).st_ino), real(fd)))
    append_event(tmp_path / "events.jsonl", "started")
    assert forced == {tmp_path.stat().st_ino, (tmp_path / "events.jsonl").stat().st_ino}


def test_every_byte_counts(tmp_path: Path) -> None:
    """A byte flipped, or the end cut off, in any file of a version is noticed, and both are named."""
    store = Store(tmp_path)
    register(store, "some text")
    artifact = store.resolve("rows:v1")
    for path in files_below(tmp_path / "rows" / "v1"):
        path.chmod(0o644)
        whole = path.read_bytes()
        spoilt = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
        for text in [*spoilt, whole.rstrip()[:-1], whole[: len(whole) // 2], b""]:  # a last line break says nothing
            path.write_bytes(text)
            with pytest.raises(UserError, match="rows:v1") as caught:
                store.verify(artifact)
            assert [problem.where for problem in caught.value.problems] == [str(path)]
        path.write_bytes(whole)
    store.verify(artifact)


def test_a_read_only_store_is_read_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    register(store, "x")

    def refuse(path: object, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    for name in ("mkdir", "open"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, real=real, **k: real(*a, **k) if a[1:2] == (os.O_RDONLY,) else refuse(*a, **k)
        )
    store.verify(store.resolve("rows"))
    assert store.names() == ["rows"]
    with pytest.raises(OSError, match="Read-only file system"):
        register(store, "y")
    (tmp_path / "env.toml").write_text(f'[artifacts]\nstore = "{tmp_path}"\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["artifacts", "alias", "rows:v1", "best"])
    assert ended.value.code == 2 and ".aliases: Read-only file system" in capsys.readouterr().err


def test_a_clock_that_goes_backwards_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    for now in (2e9, 1e9, 0.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        register(store, f"at {now}", Producer("f", "r", "s", "data"))
    assert store.versions("rows") == [1, 2, 3] and store.resolve("rows").version == 3
    found = store.find("f", "data", "rows")
    assert found is not None and found.version == 3


# Mutants: the code without one of its precautions, which the checks above must notice.


@pytest.mark.parametrize("mutant", ["no temporary name", "no new line after a torn one", "a digest nobody checks"])
def test_mutants_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    if mutant == "no temporary name":

        def in_place(path: Path, text: str | bytes, mode: int = 0o644) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(text.encode() if isinstance(text, str) else text)

        monkeypatch.setattr("nemotron_recipes.rundir.write_atomic", in_place)
        with pytest.raises((AssertionError, ValueError)):
            test_a_record_is_the_old_one_or_the_new_one(tmp_path, "short")
    elif mutant == "no new line after a torn one":

        def joins(path: Path, event: str, **fields: object) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            line = store_module.json.dumps({"event": event, **fields}) + "\n"
            if os.write(descriptor, line.encode()) < len(line):
                raise OSError(28, "")
            os.close(descriptor)

        monkeypatch.setattr("nemotron_recipes.mirror.journal.append_event", joins)
        with pytest.raises((AssertionError, UserError)):
            test_the_journal_loses_nothing_that_it_acknowledged(tmp_path, "short")
    else:
        for module in (store_module, contents):
            monkeypatch.setattr(module, "digest_of", lambda _: "sha256:always the same")
        with pytest.raises(pytest.fail.Exception):
            test_every_byte_counts(tmp_path)


@pytest.mark.parametrize("removed", ["fsync_tree", "fsync_folder"])
def test_a_version_that_is_not_on_the_disk_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    monkeypatch.setattr(store_module, removed, lambda path: None)
    with pytest.raises(AssertionError, match="durable"):
        everything_is_durable(tmp_path, monkeypatch, None)


def test_a_version_that_is_copied_instead_of_renamed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(source: Path, target: Path) -> None:
        shutil.copytree(source, target, dirs_exist_ok=True)
        shutil.rmtree(source)

    monkeypatch.setattr(os, "rename", copy)
    with pytest.raises((AssertionError, UserError)):
        test_a_version_is_whole_or_absent(tmp_path, "kill")


def test_files_count_by_content_and_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = tree_digest(tmp_path)
    os.rename(tmp_path / "a", tmp_path / "b")
    assert tree_digest(tmp_path) != before


def test_inputs_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows-1.jsonl").write_text("{}")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    wanted = [str(tmp_path / "rows-*.jsonl"), str(folder), str(tmp_path / "gone"), str(tmp_path / "none-*")]
    assert there.unreadable(wanted) == [(name, "No such file or directory") for name in wanted[2:]]
