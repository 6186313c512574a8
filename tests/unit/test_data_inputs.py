"""Every kind of file that rows come in: what is read, and what is said of damaged ones."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard

from nemotron_recipes.data.cuts import cut_inputs
from nemotron_recipes.data.files import Input, find_files
from nemotron_recipes.data.readers import BLANK, MAX_LINE, read_shard
from nemotron_recipes.data.shard_encoder import BLOCK_BYTES, _blocks
from nemotron_recipes.errors import UserError
from tests.helpers.data_jobs import job, run, varied
from tests.helpers.data_prep import bytes_of, chat, write_rows


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_rows(tmp_path: Path, kind: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", varied(300))
    run(job(file), tmp_path / "plain")
    packed = tmp_path / f"rows.jsonl.{kind}"
    half = len(file.read_bytes()) // 2
    parts = [file.read_bytes()[:half], file.read_bytes()[half:]]  # two members, or frames, one after another
    compress = gzip.compress if kind == "gz" else zstandard.ZstdCompressor().compress
    packed.write_bytes(b"".join(compress(part) for part in parts))
    run(job(packed), tmp_path / "packed")
    whole, other = bytes_of(tmp_path / "plain"), bytes_of(tmp_path / "packed")
    differing = {name for name in whole if whole[name] != other[name]}
    assert differing == {"metadata.json", "bad_rows.jsonl", "data-card.json", "data-card.md"}  # which name the file
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"rows.jsonl.* can't be read: damaged or cut off"):
        run(job(packed), tmp_path / "cut off")


def find_rows(path: Path, rows: int | None) -> list[Any]:
    found = [line.value for shard in cut_inputs(0, find_files(str(path)), rows, 1 << 20) for line in read_shard(shard)]
    return [value for value in found if value is not BLANK]


def test_json_and_parquet_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [chat(f"{n}?", f"{n}!") for n in range(50)]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "field.json").write_text(json.dumps({"version": 1, "data": rows}))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=8)
    for name in ("list.json", "field.json", "rows.parquet"):
        assert find_rows(tmp_path / name, None) == rows
        assert find_rows(tmp_path / name, 19) == rows[:19]
    cuts = cut_inputs(0, find_files(str(tmp_path / "rows.parquet")), None, 1)
    assert [(one.lo, one.hi) for one in cuts] == [(n, n + 1) for n in range(7)]
    assert [line.value for one in cuts for line in read_shard(one)] == rows
    (tmp_path / "object.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="is no JSON list"):
        find_rows(tmp_path / "object.json", None)


def test_limits_count_rows_across_files(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(4):
        write_rows(folder / f"{number}.jsonl", [{"n": 10 * number + n} for n in range(10)])
    (folder / "2.jsonl").write_bytes(b"\n\n" + (folder / "2.jsonl").read_bytes())
    assert [row["n"] for row in find_rows(folder, 23)] == [*range(20), 20, 21, 22]


def test_a_line_of_200_mb_is_counted_and_not_held(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as handle:
        handle.write(json.dumps(chat("a", "b")).encode() + b'\n{"messages": "')
        for _ in range(200):
            handle.write(b"x" * (1 << 20))
        handle.write(b'"}\n' + json.dumps(chat("c", "d")).encode())
    tracemalloc.start()
    try:
        rows = [line for shard in cut_inputs(0, find_files(str(file)), None, 4 << 20) for line in read_shard(shard)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(row.bad.reason if row.bad else row.value["messages"][0]["content"]) for row in rows] == [
        "a", "line_too_long", "c"
    ]  # fmt: skip
    assert peak < 6 * MAX_LINE


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    shard = cut_inputs(0, [Input("rows.jsonl", str(tmp_path / "rows.jsonl"), 100)], None, 1000)[0]
    with pytest.raises(UserError, match="can't be read"):
        list(read_shard(shard))


def test_a_link_to_nowhere_in_a_folder_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [chat("a", "b")])
    (tmp_path / "a.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"a\.jsonl can't be read: No such file"):
        find_files(str(tmp_path))


def test_large_rows_are_encoded_a_few_at_a_time(tmp_path: Path) -> None:
    """Also where the reader does not know how large they are."""
    rows = [chat("?", "so " * 100_000) for _ in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (shard,) = cut_inputs(0, find_files(str(tmp_path / "rows.json")), None, 1 << 20)
    blocks = [len(block) for block in _blocks(read_shard(shard))]
    assert sum(blocks) == 20
    assert max(blocks) * 300_000 < 2 * BLOCK_BYTES


def test_integers_of_any_size_stay_exact(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"n": [1, {"m": 123456789012345678901234567890}], "x": 18446744073709551615, "f": 1.5}\n')
    assert find_rows(file, None) == [{"n": [1, {"m": 123456789012345678901234567890}], "x": 2**64 - 1, "f": 1.5}]


def test_remote_files_are_read_by_ranges_and_pinned(tmp_path: Path) -> None:
    """fsspec's memory store stands for s3:// and gs://: the same calls, no server."""
    import fsspec

    from nemotron_recipes.artifacts.store import Store
    from nemotron_recipes.planning.resolve import Resolver

    store = fsspec.filesystem("memory")
    content = write_rows(tmp_path / "rows.jsonl", varied(40)).read_bytes()
    for name, part in (("a.jsonl", content), ("deep/b.jsonl.gz", gzip.compress(content)), ("notes.txt", b"none")):
        store.pipe(f"/bucket/{name}", part)
    assert [file.name for file in find_files("memory://bucket")] == ["a.jsonl", "deep/b.jsonl.gz"]
    shards_ = cut_inputs(0, find_files("memory://bucket/*.jsonl"), None, 700)
    assert len(shards_) > 3
    rows = [line.value for shard in shards_ for line in read_shard(shard)]
    assert rows == find_rows(tmp_path / "rows.jsonl", None)
    resolver = Resolver(Store(tmp_path / "store"), tmp_path, lambda _: ())
    pinned = resolver.resolve("memory://bucket", "data")
    assert (pinned.source, pinned.label) == ("remote", "memory://bucket")
    assert resolver.resolve("memory://bucket", "data") == pinned
    store.pipe("/bucket/a.jsonl", content + b"{}")
    assert resolver.resolve("memory://bucket", "data").identity != pinned.identity
    with pytest.raises(UserError, match="no rows at memory://bucket/none"):
        resolver.resolve("memory://bucket/none.jsonl", "data")
