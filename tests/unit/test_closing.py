"""Files of a run that carry no digest of their own: what stood in them at the end is held against what stands there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron_recipes import closing
from nemotron_recipes.artifacts.stages import tail
from nemotron_recipes.rundir import COPIED, Damaged, RunDir, append_event, write_record, write_sealed

ROWS = '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n'


def ended(folder: Path) -> RunDir:
    """One stage, one attempt, over."""
    run = RunDir(folder / "run")
    stage = run.stage("sft")
    write_sealed(run.plan, {"id": "run"})
    append_event(run.events, "stage-started", stage="sft", attempt=1, pid=1)
    for path, text in ((stage.log(1, 0), "first\nlast words\n"), (stage.metrics, ROWS), (run.driver_log, "done\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    write_record(stage, {"attempt": 1})
    closing.end(run, "finished", state="succeeded")
    return run


def test_every_byte_counts_and_more_may_come(tmp_path: Path) -> None:
    run = ended(tmp_path)
    stage = run.stage("sft")
    for path in (run.events, run.driver_log, stage.log(1, 0), stage.metrics):
        whole = path.read_bytes()
        flipped = [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
        for damaged in [*flipped, *(whole[:n] for n in range(len(whole)))]:
            path.write_bytes(damaged)
            with pytest.raises(Damaged, match=path.name):
                closing.check(path)
        assert [str(error.problems[0].where) for error in closing.changed(run)] == [str(path)]
        path.unlink()
        with pytest.raises(Damaged, match="gone"):
            closing.check(path)
        path.write_bytes(whole + b"more\n")
        closing.check(path)
        path.write_bytes(whole)
    assert list(closing.changed(run)) == []


@pytest.mark.parametrize(
    ("mutant", "instead"),
    [
        ("closing.check_mark", lambda *_: None),
        ("closing.mark", lambda path, _: [path.stat().st_size, ""]),
        ("closing.close", lambda _: None),
        ("closing._of_run", lambda _: None),
        ("closing._closed", lambda _: {}),
        ("closing._of_record", lambda _: None),
        ("rundir.digest_of_start", lambda *_: "sha256:always the same"),
        ("rundir.mark", lambda path: [0, ""]),
    ],
    ids=lambda mutant: mutant if isinstance(mutant, str) else "",
)
def test_a_removed_check_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str, instead: Callable[..., object]
) -> None:
    monkeypatch.setattr(f"nemotron_recipes.{mutant}", instead)
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_every_byte_counts_and_more_may_come(tmp_path)


def test_a_damaged_log_is_shown_as_that(tmp_path: Path) -> None:
    log = ended(tmp_path).stage("sft").log(1, 0)
    assert tail(log) == ["first", "last words"]
    log.write_text("first\nlost words\n")
    assert "rank-0.log is damaged" in tail(log)[0] and "lost" not in "".join(tail(log))


def test_the_next_attempt_may_write_its_metrics_anew(tmp_path: Path) -> None:
    stage = ended(tmp_path).stage("sft")
    assert [row["loss"] for row in closing.metrics(stage)] == [2.5, 1.5]
    stage.metrics.write_text(ROWS.replace("1.5", "1.4"))
    with pytest.raises(Damaged, match=r"metrics\.jsonl"):
        closing.metrics(stage)
    stage.logs(2).mkdir()  # it has begun
    assert [row["loss"] for row in closing.metrics(stage)] == [2.5, 1.4]


@pytest.mark.parametrize("kind", ["a copy", "of an earlier version"])
def test_what_is_not_known_is_taken_as_it_is(tmp_path: Path, kind: str) -> None:
    run = ended(tmp_path)
    stage = run.stage("sft")
    if kind == "a copy":
        write_sealed(run.path / COPIED, {"files": {}, "time": 0})
    else:
        (run.path / closing.CLOSED).unlink()
        write_sealed(stage.record, {"attempt": 1}, kind="record")
    for path in (run.events, stage.log(1, 0), stage.metrics):
        path.write_bytes(path.read_bytes()[:-3])
        closing.check(path)


def test_an_end_does_not_take_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of logs beyond what can be read quickly the length is held against: the short ones are read first."""
    monkeypatch.setattr(closing, "MOST", 1000)
    run = ended(tmp_path)
    log = run.stage("sft").log(1, 1)
    log.write_text("x" * 2000)
    closing.close(run)
    log.write_text("y" * 2000)
    closing.check(log)
    log.write_text("y" * 1999)
    with pytest.raises(Damaged, match="of its 2000 bytes 1999 are left"):
        closing.check(log)
    run.driver_log.write_text("gone\n")
    with pytest.raises(Damaged):
        closing.check(run.driver_log)
