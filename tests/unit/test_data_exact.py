"""The output is the same bytes for any cuts, and any number of processes and parts; counts balance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_recipes.data.cuts import cut_inputs
from nemotron_recipes.data.files import find_files
from nemotron_recipes.data.prepare import prepare_part
from nemotron_recipes.data.readers import read_shard
from nemotron_recipes.data.shards import content_digest
from tests.helpers.data_jobs import cut, job, run, varied
from tests.helpers.data_prep import bytes_of, write_rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.sampled_from([b"{}", b"", b"  ", b'{"a": "xyz"}', b"\xff", b"[1"]), max_size=8),
    ending=st.booleans(),
    size=st.integers(1, 20),
)
def test_wherever_a_file_is_cut_no_line_is_lost_or_read_twice(
    tmp_path_factory: Any, lines: list[bytes], ending: bool, size: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if ending else b""))

    def rows(target: int) -> list[tuple[int, Any, str]]:
        found, base = [], 0
        for shard in cut_inputs(0, find_files(str(path)), None, target):
            last = 0
            for line in read_shard(shard):
                last = line.number
                found.append((base + line.number, line.value, line.bad.reason if line.bad else ""))
            base += last
        return found

    assert rows(size) == rows(1 << 20)
    assert len(rows(size)) == path.read_bytes().count(b"\n") + (not path.read_bytes().endswith(b"\n")) - (
        path.stat().st_size == 0
    )


def test_a_shard_is_known_by_the_lines_that_start_in_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": 2}\n{"c": 3}\n')

    def digests() -> list[str]:
        return [content_digest(shard) for shard in cut_inputs(0, find_files(str(path)), None, 10)]

    first, second, third = digests()
    path.write_bytes(path.read_bytes() + b'{"d": 4}\n')
    assert digests()[:2] == [first, second]
    path.write_bytes(path.read_bytes().replace(b'"b": 2', b'"b": 5'))
    assert digests()[0] != first or digests()[1] != second
    assert digests()[2] != third  # its last line goes on behind the cut


@pytest.mark.parametrize("size", [150, 1_000])
def test_cuts_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    file = write_rows(tmp_path / "rows.jsonl", varied(120))
    run(job(file), tmp_path / "whole")
    cut(monkeypatch, size)
    report = run(job(file), tmp_path / "cut")
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    assert not report.warnings


def test_the_number_of_processes_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "rows.jsonl", varied(120))
    run(job(file), tmp_path / "one")
    cut(monkeypatch, 1_000)
    run(job(file, workers=3), tmp_path / "three")
    assert bytes_of(tmp_path / "three") == bytes_of(tmp_path / "one")


@pytest.mark.parametrize("parts", [2, 30])
def test_parts_done_elsewhere_are_taken_over(tmp_path: Path, parts: int) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(5):
        write_rows(folder / f"{number}.jsonl", varied(10, seed=number))
    run(job(folder), tmp_path / "one")
    done = [prepare_part(job(folder, tmp_path / "spools"), part, parts) for part in reversed(range(1, parts))]
    assert sum(part.shards for part in done) == (5 - len(range(0, 5, parts)))
    assert {part.of for part in done} == {5}
    again = prepare_part(job(folder, tmp_path / "spools"), 1, parts)
    assert (again.shards, again.reused) == (done[-1].shards, done[-1].shards)
    report = run(job(folder, tmp_path / "spools"), tmp_path / "merged")
    assert report.reused == sum(part.shards for part in done), "part 0 was lost"
    assert bytes_of(tmp_path / "merged") == bytes_of(tmp_path / "one")


def test_counts_balance_for_every_file(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(3):
        write_rows(folder / f"{number}.jsonl", varied(20 * number + 5, seed=number))
    report = run(job(folder), tmp_path / "out")
    (source,) = report.sources
    assert [file["identity"]["name"] for file in source["files"]] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    for one in (*source["files"], source):
        assert one["rows_read"] == one["rows_written"] + sum(one["rows_dropped"].values())
    assert [file["rows_read"] for file in source["files"]] == [5, 25, 45]
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(one["file"], one["line"]) for one in bad][:3] == [("0.jsonl", 1), ("1.jsonl", 1), ("1.jsonl", 14)]
