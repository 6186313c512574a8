"""A byte changed, or the end cut off, in any file that a command believes is noticed before it is used, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts import gc
from nemotron_recipes.artifacts.records import load_run
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import UserError
from nemotron_recipes.lifecycle import submitting
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.rundir import RunDir, append_event, read_json, read_jsonl, write_record, write_sealed
from nemotron_recipes.seals import opened, sealed

PLAN = {"id": "r", "title": "t \u00e9", "created": "2026-01-01", "stages": [], "numbers": [1, 2.5, -1e-05], "n": None}
RECORD = {"state": "succeeded", "attempt": 1, "exit_code": 0, "fingerprint": "f", "results": {"loss": 0.25}}


def spoilt(whole: bytes) -> list[bytes]:
    """Every byte with another lowest bit, with another letter case, and cut off at every length."""
    flipped = [
        whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]
        for place in range(len(whole))
        for bit in (0x01, 0x20)
    ]
    return [*flipped, *(whole[:length] for length in range(len(whole) - 1))]


def everywhere(path: Path, read: Callable[[], object], least: int = 20) -> None:
    """What `read` returns stays the same, as for 1e-05 and 1E-05; or it names the file."""
    whole, right = path.read_bytes(), read()
    assert len(whole) > least
    harmless = 0
    for text in spoilt(whole):
        path.write_bytes(text)
        try:
            assert read() == right, text
            harmless += 1
        except UserError as told:
            assert path.name in str(told) and str(path.parent) in str(told), text
    assert harmless <= 4
    path.write_bytes(whole)
    assert read() == right


@pytest.mark.parametrize("name", ["plan.json", "mirror/target.json"])
def test_documents_of_a_run(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_sealed(path, PLAN)
    assert read_json(path) == PLAN
    everywhere(path, lambda: read_json(path))


def test_a_record(tmp_path: Path) -> None:
    stage = RunDir(tmp_path).stage("sft")
    write_record(stage, RECORD)
    assert read_json(stage.record) == {**RECORD, "files": {}}
    everywhere(stage.record, lambda: read_json(stage.record))


def test_a_run_with_a_damaged_file_is_listed_as_that(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    stage = {"name": "sft", "reused": None, "fingerprint": "f"}
    write_sealed(run.plan, {**PLAN, "stages": [stage]})
    write_record(run.stage("sft"), {**RECORD, "parents": [], "outputs": {}, "started": 1.0, "ended": 2.0})
    assert load_run(run.path).state == "succeeded"
    for path, old, new in (
        (run.stage("sft").record, b'"exit_code": 0', b'"exit_code": 1'),
        (run.plan, b'"fingerprint": "f"', b'"fingerprint": "g"'),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(old, new))
        view = load_run(run.path)
        assert view.state == "lost" and f"{path.name} is damaged" in view.explanation and str(path) in view.explanation
        with pytest.raises(UserError, match="what run r reads is unknown"):
            gc.find(Store(tmp_path / "store"), [view], gc.Policy(), 1.0)
        with pytest.raises(UserError, match="whether this plan is running is unknown"):
            submitting.refuse_rerun(run)
        path.write_bytes(whole)


def test_a_saved_plan(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    write_sealed(path, PLAN, kind="plan")
    path.write_bytes(path.read_bytes().replace(b'"id": "r"', b'"id": "s"'))
    with pytest.raises(UserError, match="is not a plan: it isn't what was written"):
        lifecycle.load_plan(path)


def test_an_alias(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for text in "ab":
        staged = store.stage("rows")
        (staged.content / "x").write_text(text)
        store.commit(staged, kind="data")
    store.alias("rows", "best", 2)
    path = tmp_path / "rows/.aliases/best"
    everywhere(path, lambda: store.resolve("rows:best"), least=10)
    path.write_text("v1\n")
    assert store.resolve("rows:best").version == 1, "as it was written before aliases had a check"


def test_a_quarantined_thing(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    gc.quarantine(tmp_path, [gc.Item("x/y/iter_0000001", str(tmp_path / "thing"), 1, "old")], 1.0)
    (path,) = tmp_path.glob(".quarantine/*/item.json")
    everywhere(path, lambda: gc.quarantined(tmp_path))


@pytest.mark.parametrize("file", ["entries_file", "done_file"])
def test_a_journal(tmp_path: Path, file: str) -> None:
    """A changed line is named. A missing end looks as if its writer had died: what is left is whole."""
    journal = Journal(tmp_path)
    journal.started("sft", 1, [])
    journal.output("sft", "model", "model", 1)
    journal.acknowledge("started sft 1")
    journal.acknowledge("output model:v1", wandb="x")
    path: Path = getattr(journal, file)
    whole = path.read_bytes()
    read = lambda: [*journal.entries(), *journal.done().values()]  # noqa: E731
    before = read()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = read()
        except UserError as error:
            assert f"{path}, line" in str(error)
        else:  # the name of a line's seal, which then is one more field; or the end of the last line
            assert all(any(entry.items() >= old.items() for old in before) for entry in found)
            assert len(found) >= len(before) - 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert all(entry in before for entry in read())


def test_a_torn_line_is_forgiven_only_where_the_next_writer_saw_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_event(path, "one", key="a")
    with open(path, "ab") as handle:
        handle.write(b'{"time": 1, "event": "tw')
    assert [event["event"] for event in read_jsonl(path, strict=True)] == ["one"]
    append_event(path, "three", key="c")
    assert [event["event"] for event in read_jsonl(path, strict=True)] == ["one", "three"]
    path.write_bytes(path.read_bytes().replace(b', "after": "torn"', b""))
    assert [event["event"] for event in read_jsonl(path)] == ["one"]
    with pytest.raises(UserError, match="events.jsonl"):
        list(read_jsonl(path, strict=True))


def test_two_torn_lines_and_a_writer_without_seals(tmp_path: Path) -> None:
    """A run folder of a version that did not seal stays readable, and so does one that died twice in a row."""
    path = tmp_path / "events.jsonl"
    events = lambda: [event["event"] for event in read_jsonl(path, strict=True)]  # noqa: E731
    torn = b'{"time": 1, "event": "tw'
    append_event(path, "one")
    for _ in range(2):
        with open(path, "ab") as handle:
            handle.write(torn + b"\n")  # the second writer began a new line, and was cut short too
    with open(path, "ab") as handle:
        handle.write(torn)
    append_event(path, "two")
    assert events() == ["one", "two"]
    old = torn + b'\n{"time": 2, "event": "three"}\n'
    with open(path, "ab") as handle:
        handle.write(old + torn)
    assert events() == ["one", "two", "three"]
    append_event(path, "four")
    assert events() == ["one", "two", "three", "four"]
    with open(path, "ab") as handle:
        handle.write(torn + b"\n" + torn)
    with pytest.raises(UserError, match="line 10"):  # the first of them: nobody has forgiven it
        events()


def test_a_metric_called_sum_keeps_its_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "sum": 2.5}, {"step": 2, "sum": 3}, {"step": 3, "sum": "much"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_jsonl(path)) == rows


@pytest.mark.parametrize("tree", [{}, {"a": 1}, {"sealed_as": "plan", "a": 1}, {"sealed": "x"}])
def test_what_never_had_a_seal_is_taken_as_it_is(tree: dict[str, Any]) -> None:
    if tree.keys() & {"sealed", "sealed_as"}:
        with pytest.raises(ValueError, match="isn't what was written"):
            opened(dict(tree))
    else:
        assert opened(dict(tree)) == tree
        assert opened(json.loads(json.dumps(sealed(tree, "plan")))) == tree
