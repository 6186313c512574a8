"""The output is the same bytes for any cuts, any number of processes, any engine, and after any crash."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_recipes.data import fast_render, shards
from nemotron_recipes.data.chat import ChatEncoder
from nemotron_recipes.data.encoder import Encoded, Encoder
from nemotron_recipes.data.files import Input, find_files
from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.metadata import write_metadata
from nemotron_recipes.data.prepare import Job, Progress, Report, prepare, prepare_part
from nemotron_recipes.data.readers import BLANK, MAX_LINE, read_shard
from nemotron_recipes.data.rows import Row
from nemotron_recipes.data.settings import read_settings
from nemotron_recipes.data.shards import content_digest, cut_inputs
from nemotron_recipes.data.spools import UNFINISHED, Spools
from nemotron_recipes.data.template import Rendered
from nemotron_recipes.errors import JobFailed, UserError
from tests.helpers.data_prep import TEMPLATE, bytes_of, chat, encoder, merging_folder, tiny_folder, write_rows
from tests.unit.test_data_encoder import conversations, hostile_text, text

ROOT = Path(__file__).parents[2]


def varied(count: int, seed: int = 0) -> list[Any]:
    """Rows of every kind: several lengths, thoughts, held-out ones, bad ones."""
    random_ = random.Random(seed)
    rows: list[Any] = []
    for number in range(count):
        row = chat(f"What is {number}?", "It is " + "so " * random_.randint(1, 40) + str(number))
        if number % 7 == 0:
            row["messages"][1]["reasoning_content"] = "Let me see.\n"
        if number % 11 == 0:
            row["messages"][1]["content"] += "<|im_end|>é"
        if number % 13 == 0:
            row = {"messages": number}
        rows.append(row)
    return rows


def job(file: Path, spools: Path | None = None, **data: Any) -> Job:
    source = {"path": str(file), "weight": data.pop("weight", 1.5)}
    tree = {"sources": [source], "tokenizer": "tiny", "pack_size": 128, "workers": 1, **data}
    return Job("sft", read_settings(tree, "sft"), (file,), tiny_folder(), TEMPLATE, spools=spools)


def run(made: Job, output: Path, progress: Progress | None = None) -> Report:
    output.mkdir(parents=True)
    report = prepare(made, output, progress)
    write_metadata(made, report, output)
    return report


def cut(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", size)


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


SCRIPT = """
import sys
from pathlib import Path
from nemotron_recipes.data import shards
from tests.unit import test_data_exact as t
shards.SHARD_BYTES = 1500
if __name__ == "__main__":
    file, output, spools, workers = sys.argv[1:]
    t.run(t.job(Path(file), Path(spools), workers=int(workers)), Path(output))
"""


def start(tmp_path: Path, file: Path, name: str, workers: int) -> subprocess.Popen[bytes]:
    script = tmp_path / "crash.py"
    script.write_text(SCRIPT)
    words = [sys.executable, str(script), str(file), str(tmp_path / name), str(tmp_path / "spools"), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, cwd=ROOT, stderr=subprocess.PIPE)


def finished(spools: Path) -> list[Path]:
    return sorted(path.parent for path in spools.glob("[!.]*/facts.json"))


def crash_and_compare(tmp_path: Path, kills: int, workers: int, seed: int) -> None:
    """Runs are killed at random moments; each takes over what the ones before have left; the last one is let be."""
    file = write_rows(tmp_path / "rows.jsonl", varied(400))
    run(job(file), tmp_path / "undisturbed")
    random_ = random.Random(seed)
    spools = tmp_path / "spools"
    killed = 0
    for number in range(kills):
        process = start(tmp_path, file, f"killed-{number}", workers)
        wanted = len(finished(spools)) + random_.randint(0, 20)
        while process.poll() is None and len(finished(spools)) < wanted:
            time.sleep(0.002)
        with suppress(subprocess.TimeoutExpired):
            process.wait(random_.choice([0, random_.uniform(0, 0.05), random_.uniform(0, 1)]))
        killed += process.poll() is None
        process.kill()
        process.communicate(timeout=60)
        for path in finished(spools):  # else all would soon be done
            if random_.random() < 0.5:
                path.rename(tmp_path / f"away-{number}-{path.name}")
    assert killed >= kills // 2, f"seed {seed}: {killed}"
    process = start(tmp_path, file, "after", workers)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert bytes_of(tmp_path / "after") == bytes_of(tmp_path / "undisturbed")
    assert len(finished(spools)) >= 20


def test_after_kills_the_bytes_are_the_same(tmp_path: Path) -> None:
    crash_and_compare(tmp_path, kills=3, workers=1, seed=int(time.time()))


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_after_many_kills_the_bytes_are_the_same(tmp_path: Path, workers: int) -> None:
    crash_and_compare(tmp_path, kills=50, workers=workers, seed=int(time.time()))


def spawned(parent: int) -> list[psutil.Process]:
    """The worker processes of a run."""
    found = []
    for child in psutil.Process(parent).children():
        with suppress(psutil.Error):  # a process that is just going
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_no_process_outlives_a_killed_run(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", varied(3000))
    process = start(tmp_path, file, "killed", 2)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not children and process.poll() is None and time.monotonic() < deadline:
        children = spawned(process.pid)
        time.sleep(0.02)
    assert children
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_a_killed_worker_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 1_500)
    file = write_rows(tmp_path / "rows.jsonl", varied(3000))

    class Kill(Progress):
        def update(self, rows: int, share: float) -> None:
            for child in spawned(os.getpid()):
                with suppress(psutil.Error):
                    child.send_signal(signal.SIGKILL)

    with pytest.raises(JobFailed, match=r"rows.jsonl was killed by signal 9 \(out of memory\?\); run again"):
        run(job(file, workers=2), tmp_path / "out", Kill())


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


def test_a_full_disk_is_said_plainly(tmp_path: Path) -> None:
    """A limit on the size of files fails where a full disk would."""
    file = write_rows(tmp_path / "rows.jsonl", varied(400))
    code = "import sys; from tests.unit.test_data_exact import full; full(*sys.argv[1:])"
    words = [sys.executable, "-c", code, str(file), str(tmp_path / "out"), str(tmp_path / "spools")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.strip().startswith("JobFailed: rows.jsonl: its tokens can't be written: [Errno 27]"), done.stderr
    assert not list((tmp_path / "spools").glob("*/facts.json"))
    assert run(job(file, tmp_path / "spools"), tmp_path / "later").total.read == 400


def full(file: str, output: str, spools: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        run(job(Path(file), Path(spools)), Path(output))
    except JobFailed as error:
        print(f"JobFailed: {error}")


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    shard = cut_inputs(0, [Input("rows.jsonl", str(tmp_path / "rows.jsonl"), 100)], None, 1000)[0]
    with pytest.raises(UserError, match="can't be read"):
        list(read_shard(shard))


ENGINES = ("tokenizers", "fastokens")


@cache
def with_engine(name: str) -> Encoder:
    return Encoder(merging_folder(), TEMPLATE, name)


TALKS = st.lists(conversations(st.one_of(hostile_text, text)), min_size=1, max_size=3)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=50, deadline=None)
@given(talks=TALKS, prompt=st.booleans())
def test_the_quick_way_is_the_references(engine: str, talks: list[list[dict[str, Any]]], prompt: bool) -> None:
    quick_and_reference(engine, talks, prompt)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=2000, deadline=None)
@given(talks=TALKS, prompt=st.booleans())
def test_the_quick_way_is_the_references_thousands_of_times(
    engine: str, talks: list[list[dict[str, Any]]], prompt: bool
) -> None:
    quick_and_reference(engine, talks, prompt)


def quick_and_reference(engine: str, talks: list[list[dict[str, Any]]], prompt: bool) -> None:
    one = with_engine(engine)
    assert one.engine.name == engine
    assert one.fast_render is not None
    rows = [Row(messages=messages) for messages in talks]
    quick, reference = ChatEncoder(one, prompt), ChatEncoder(one, prompt, quick=False)
    for ours, theirs in zip(quick.conversations(rows), reference.conversations(rows), strict=True):
        assert isinstance(ours, BadRow) == isinstance(theirs, BadRow)
        for a, b in zip(ours, theirs, strict=True) if not isinstance(ours, BadRow) else ():  # type: ignore[arg-type]
            assert isinstance(a, Encoded)
            assert a.ids.tolist() == b.ids.tolist()
            assert a.mask.tolist() == b.mask.tolist()
            assert a.blocks == b.blocks
    for ours, theirs in zip(quick.prompts(rows), reference.prompts(rows), strict=True):
        assert isinstance(ours, BadRow) or ours.tolist() == theirs.tolist()


def test_the_quick_way_is_taken() -> None:
    one = encoder("merging")
    assert one.fast_render is not None
    plain = one.fast_render([{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}], [], False, True)
    assert isinstance(plain, Rendered)
    assert isinstance(one.encode([plain])[0], Encoded)


@pytest.mark.parametrize("fault", ["text", "mask"])
def test_one_differing_row_hands_the_shard_to_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", varied(60))
    run(job(file), tmp_path / "right")
    render = fast_render._Nemotron3.render

    def wrong(self: Any, *args: Any) -> Rendered | None:
        found = render(self, *args)
        if found is None:
            return None
        if fault == "text":
            return found._replace(text=found.text.replace("What", "Who"))
        return found._replace(generated=tuple((start + 1, end) for start, end in found.generated))

    monkeypatch.setattr(fast_render._Nemotron3, "render", wrong)
    report = run(job(file), tmp_path / "wrong")
    assert "the reference" in report.warnings[0]
    assert bytes_of(tmp_path / "wrong") == bytes_of(tmp_path / "right")


def test_engines_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_recipes.data.engine import Fastokens

    def wrong(self: Any, texts: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(len(texts), dtype=np.int32), np.arange(len(texts) + 1)

    monkeypatch.setattr(Fastokens, "encode", wrong)
    with pytest.raises(UserError, match="gives other ids for this tokenizer than the reference"):
        Encoder(merging_folder(), TEMPLATE, "fastokens")


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
