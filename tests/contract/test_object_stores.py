"""Rows from s3:// and gs:// through the real clients and servers that speak the protocols (tests/helpers)."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cli import nemotron
from tests.helpers.data_prep import chat, write_rows
from tests.helpers.object_stores import ObjectStore, object_store

pytestmark = pytest.mark.long
WORDS = ("nano3", "data", "prep", "sft", "data.tokenizer=tiny", "data.pack_size=128", "data.workers=2")
COMMAND = "import sys; from nemotron_recipes.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    with object_store(request.param) as found:
        yield found


def uploaded(store: ObjectStore, folder: Path) -> None:
    """The same rows in `folder` and, as rows/talks, in the store."""
    (folder / "deep").mkdir(parents=True)
    talks = [chat(f"What is {n}?", f"It is {n}, " + "so " * (n % 30)) for n in range(300)]
    write_rows(folder / "a.jsonl", [*talks[:200], {"messages": 1}])
    plain = write_rows(folder / "b.jsonl", talks[200:]).read_bytes()
    (folder / "b.jsonl").unlink()
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(plain, mtime=0))
    store.put({f"talks/{name}": folder / name for name in ("a.jsonl", "deep/b.jsonl.gz")})


def prepared(folder: Path) -> dict[str, bytes]:
    """What training reads of the only artifact in the folder's store."""
    (metadata,) = (folder / "nemotron-output" / "store").rglob("metadata.json")
    return {
        path.relative_to(metadata.parent).as_posix(): path.read_bytes()
        for path in metadata.parent.rglob("*")
        if path.suffix in (".npy", ".jsonl")
    }


def run(store: ObjectStore, folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    """`nemotron` in `folder`: exit code, and what it said."""
    code = f"import os; os.chdir({str(folder)!r}); {COMMAND}"
    done = store.python(code, *words, **environment)
    return done.returncode, done.stdout + done.stderr


def test_the_same_rows_give_the_same_bytes_wherever_they_lie(store: ObjectStore, tmp_path: Path) -> None:
    uploaded(store, tmp_path / "rows")
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    code, said = run(store, tmp_path / "there", *WORDS, f"data.sources=[{{path: '{store.scheme}://rows/talks'}}]")
    assert code == 0, said
    nemotron(tmp_path / "here", *WORDS, f"data.sources=[{{path: {tmp_path / 'rows'}}}]")
    assert prepared(tmp_path / "there") == prepared(tmp_path / "here")


def test_a_file_that_was_replaced_after_planning_is_noticed(store: ObjectStore, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [chat("a", "b")])
    store.put({"a.jsonl": file})
    source = f"data.sources=[{{path: '{store.scheme}://rows/a.jsonl'}}]"
    plan = tmp_path / "plan.json"
    code, said = run(store, tmp_path, *WORDS, source, "--dry-run", "--plan-out", str(plan))
    assert code == 0, said
    store.put({"a.jsonl": write_rows(file, [chat("a", "c")])})  # as long as before
    code, said = run(store, tmp_path, "apply", str(plan))
    assert code == 2, said
    assert "changed" in said
    assert "Traceback" not in said


WHILE_READ = """
import json, sys
from pathlib import Path
import fsspec
from nemotron_recipes.data.job import Progress
from nemotron_recipes.errors import UserError
from tests.helpers.data_jobs import job, run
scheme, folder, content = sys.argv[1:]
class Replace(Progress):
    def update(self, rows, share):
        fsspec.filesystem(scheme).pipe("rows/a.jsonl", open(content, "rb").read())
place = scheme + "://rows/a.jsonl"
made = job(place)
try:
    run(made, Path(folder), Replace())
except UserError as error:
    print(error)
"""


def test_a_file_that_is_replaced_while_it_is_read_ends_the_run(store: ObjectStore, tmp_path: Path) -> None:
    """Also where it has as many bytes as before: the store's own word for its content tells."""
    store.put({"a.jsonl": write_rows(tmp_path / "a.jsonl", [chat("a", "b")])})
    other = write_rows(tmp_path / "other.jsonl", [chat("a", "c")])
    done = store.python(WHILE_READ, store.scheme, str(tmp_path / "out"), str(other))
    assert f"changed while it was read: {store.scheme}://rows/a.jsonl" in done.stdout, done.stderr


@pytest.mark.parametrize("path", ["none/a.jsonl", "rows/none"])
def test_an_address_at_which_nothing_lies(store: ObjectStore, tmp_path: Path, path: str) -> None:
    store.put({"a.jsonl": write_rows(tmp_path / "a.jsonl", [chat("a", "b")])})
    address = f"{store.scheme}://{path}"
    code, said = run(store, tmp_path, *WORDS, f"data.sources=[{{path: '{address}'}}]")
    assert code == 2, said
    assert (f"{address} is not there" if path.startswith("none") else f"no rows at {address}") in said
    assert "Traceback" not in said
    assert not list((tmp_path / "nemotron-output").rglob("metadata.json"))


LOST = """
import sys, os, signal
from nemotron_recipes.data.cuts import cut_inputs
from nemotron_recipes.data.files import find_files
from nemotron_recipes.data.readers import read_shard
from nemotron_recipes.errors import UserError
place, server = sys.argv[1], int(sys.argv[2])
(shard,) = cut_inputs(0, find_files(place), None, 1 << 30)
rows = read_shard(shard)
print(next(rows).number)
os.kill(server, signal.SIGKILL)
try:
    print(sum(1 for _ in rows))
except UserError as error:
    print(error)
"""


def test_a_connection_that_is_lost_is_said_plainly(store: ObjectStore, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes((json.dumps(chat("a", "b" * 1000)).encode() + b"\n") * 12_000)  # more than is read ahead
    store.put({"a.jsonl": file})
    place = f"{store.scheme}://rows/a.jsonl"
    done = store.python(LOST, place, str(store.process.pid))
    assert done.stdout.startswith("1\n"), done.stderr
    assert f"{place} can't be read: " in done.stdout


def test_without_credentials_the_command_says_so(tmp_path: Path) -> None:
    with object_store("s3") as store:
        store.put({"a.jsonl": write_rows(tmp_path / "a.jsonl", [chat("a", "b")])})
        none = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": os.fspath(tmp_path)}
        code, said = run(store, tmp_path, *WORDS, "data.sources=[{path: 's3://rows/a.jsonl'}]", **none)
    assert code == 2, said
    assert "NoCredentialsError" in said
    assert "credentials that the store's own tools use" in said
    assert "Traceback" not in said
