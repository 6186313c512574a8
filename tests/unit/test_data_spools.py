"""What an earlier run has done is taken over, and nothing that is stale."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.data.job import Job, Progress
from nemotron_recipes.data.spool import is_whole
from nemotron_recipes.data.spools import UNFINISHED, Spools
from nemotron_recipes.errors import UserError
from tests.helpers.data_jobs import cut, job, run, varied
from tests.helpers.data_prep import TEMPLATE, bytes_of, merging_folder, write_rows


def test_what_is_done_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 1_500)
    spools = tmp_path / "spools"
    file = write_rows(tmp_path / "rows.jsonl", varied(100))
    assert run(job(file, spools), tmp_path / "first").reused == 0
    count = len(list(spools.glob("*/facts.json")))
    assert count > 5
    changes: dict[str, dict[str, Any]] = {
        "pack": {"pack_size": 256},
        "cut": {"overlong": "truncate"},
        "weight": {"weight": 3.0},
    }
    for name, change in changes.items():
        report = run(job(file, spools, **change), tmp_path / name)
        assert report.reused == count
        assert bytes_of(tmp_path / name) == bytes_of_fresh(job(file, **change), tmp_path / f"{name}-fresh")
    write_rows(file, [*varied(100), *varied(10, seed=1)])
    assert run(job(file, spools), tmp_path / "grown").reused >= count - 1


def bytes_of_fresh(made: Job, output: Path) -> dict[str, bytes]:
    run(made, output)
    return bytes_of(output)


def test_a_byte_of_it_that_has_changed_is_noticed_and_it_is_made_anew(tmp_path: Path) -> None:
    spools = tmp_path / "spools"
    file = write_rows(tmp_path / "rows.jsonl", varied(20))
    assert run(job(file, spools), tmp_path / "first").reused == 0
    (spool,) = (path.parent for path in spools.glob("[!.]*/facts.json"))
    for path in sorted(spool.iterdir()):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :] if whole else b"x"
        for damaged in {flipped, whole[:-1]} - {whole}:
            path.write_bytes(damaged)
            assert not is_whole(spool), path.name
        path.write_bytes(flipped)
        assert run(job(file, spools), tmp_path / path.name).reused == 0
        assert is_whole(spool) and bytes_of(tmp_path / path.name) == bytes_of(tmp_path / "first")


def test_a_change_of_anything_is_noticed(tmp_path: Path) -> None:
    spools = tmp_path / "spools"
    file = write_rows(tmp_path / "rows.jsonl", varied(20))
    run(job(file, spools), tmp_path / "first")
    changes: list[Job] = [
        job(file, spools, thinking=False),
        job(file, spools, answer_pattern="is (.*)"),
        job(file, spools, splits={"train": 0.5, "validation": 0.25, "test": 0.25}),
        job(file, spools, weight=0.5),
        replace(job(file, spools), tokenizer=merging_folder()),
        replace(job(file, spools), template_source=TEMPLATE + "{# #}"),
        job(write_rows(tmp_path / "other.jsonl", varied(21)), spools),
    ]
    for number, made in enumerate(changes):
        assert run(made, tmp_path / str(number)).reused == 0
    assert run(job(file, spools), tmp_path / "again").reused == 1


def test_a_second_run_waits(tmp_path: Path) -> None:
    waiting, done = threading.Event(), threading.Event()

    def second() -> None:
        with Spools(tmp_path, ["key"], "input", lambda _: waiting.set()):
            done.set()

    with Spools(tmp_path, ["key"], "input", lambda _: None):
        for keys, inputs in ((["another key"], "input"), (["key"], "another input")):
            with Spools(tmp_path, keys, inputs, lambda _: waiting.set()):
                assert not waiting.is_set()
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60)
        assert not done.is_set()
    thread.join(60)
    assert done.is_set()


@pytest.mark.parametrize("spoil", ["gone", "short"])
def test_a_spool_that_lost_something_is_made_anew(tmp_path: Path, spoil: str) -> None:
    spools = tmp_path / "spools"
    file = write_rows(tmp_path / "rows.jsonl", varied(20))
    run(job(file, spools), tmp_path / "first")
    (spool,) = (path for path in spools.iterdir() if path.is_dir())
    if spoil == "gone":
        (spool / "ids").unlink()
    else:
        os.truncate(spool / "ids", 40)
    assert run(job(file, spools), tmp_path / "second").reused == 0
    assert run(job(file, spools), tmp_path / "third").reused == 1
    for path in (tmp_path / "first" / "train").iterdir():
        assert (tmp_path / "third" / "train" / path.name).read_bytes() == path.read_bytes()
    assert not [path for path in spools.iterdir() if path.name.startswith(".")]


def test_half_a_spool_that_grows_is_nobodys_remains(tmp_path: Path) -> None:
    """A shard may take longer than a day: its folder was changed when it began, its files just now."""
    for name, age in ((".grows.tmp", 0), (".left.tmp", 2 * UNFINISHED)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "ids").write_bytes(b"x")
        then = time.time() - age
        os.utime(folder / "ids", (then, then))
        os.utime(folder, (time.time() - 2 * UNFINISHED,) * 2)
    with Spools(tmp_path, ["key"], "input", print):
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [".grows.tmp"]


def test_old_spools_go_and_used_ones_stay(tmp_path: Path) -> None:
    spools = tmp_path / "spools"
    file = write_rows(tmp_path / "rows.jsonl", varied(5))
    run(job(file, spools), tmp_path / "first")
    other = write_rows(tmp_path / "other.jsonl", varied(6))
    run(job(other, spools), tmp_path / "second")
    (spools / ".left.tmp").mkdir()
    ages = {path: 10 * 24 * 3600 for path in spools.iterdir() if path.is_dir()}
    for path, age in ages.items():
        os.utime(path, (time.time() - age, time.time() - age))
    run(job(file, spools), tmp_path / "third")  # its own spool is young again
    for path in spools.glob("*/"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10 * 24 * 3600))
    assert run(job(file, spools), tmp_path / "fourth").reused == 1
    assert len(list(spools.glob("*/facts.json"))) == 1
    assert not (spools / ".left.tmp").exists()


def test_an_input_that_changes_meanwhile_ends_the_run(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", varied(20))

    class Append(Progress):
        def update(self, rows: int, share: float) -> None:
            with file.open("a") as handle:
                handle.write("{}\n")

    with pytest.raises(UserError, match=r"changed while it was read: .*rows.jsonl"):
        run(job(file), tmp_path / "out", Append())
