"""The artifact store: what a reader finds, what a name may be, and that versions share nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron_recipes.artifacts import contents, staging
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import UserError
from nemotron_recipes.fsio import files_below, tree_digest
from nemotron_recipes.spec import Artifact, Producer


def register(
    store: Store, name: str, text: str = "x", fingerprint: str = "sha256:f", run: str = "r1", **more
) -> Artifact:
    staged = store.stage(name)
    (staged.content / "deep").mkdir()
    (staged.content / "deep" / "data.txt").write_text(text)
    return store.commit(staged, kind="data", producer=Producer(fingerprint, run, "prep", "data"), **more)


def test_versions_count_up_and_stay_as_they_are(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first, second = register(store, "rows", "one"), register(store, "rows", "two")
    assert (first.label, second.label) == ("rows:v1", "rows:v2")
    assert (Path(first.uri) / "deep" / "data.txt").read_text() == "one"
    assert store.resolve("rows") == store.resolve("rows:latest") == store.resolve("rows:v2") == second
    assert store.resolve("rows:v1") == first
    assert first.digest == tree_digest(Path(first.uri))
    assert store.names() == ["rows"] and store.versions("rows") == [1, 2]


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(11):
        register(store, "rows", str(number))
    assert store.resolve("rows").version == 11


def test_manifest_says_where_a_version_comes_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    parent = Artifact("path", "data", uri="/data/a.jsonl", digest="sha256:1")
    made = register(
        store,
        "rows",
        parents={"data.path": parent},
        metadata={"rows": 3},
        results={"loss": 0.5},
        config={"lr": 1},
        attempt=2,
    )
    manifest = store.describe(made)
    assert manifest["producer"] == {
        "fingerprint": "sha256:f", "run": "r1", "stage": "prep", "slot": "data", "attempt": 2, "config": {"lr": 1},
    }  # fmt: skip
    (entry,) = manifest["parents"]
    assert entry.pop("input") == "data.path" and Artifact.from_tree(entry) == parent
    assert (manifest["files"], manifest["size"], manifest["metadata"], manifest["results"]) == (
        1, 1, {"rows": 3}, {"loss": 0.5},
    )  # fmt: skip


@pytest.mark.parametrize(
    "ref", ["row", "rows:v9", "rows:lates", "rows:", "../rows", "", "rows:../../x", "a b", "rows:v01"]
)
def test_a_wrong_reference_is_one_clear_message(tmp_path: Path, ref: str) -> None:
    store = Store(tmp_path)
    register(store, "rows")
    with pytest.raises(UserError) as error:
        store.resolve(ref)
    assert len(error.value.problems) == 1 and error.value.problems[0].fix


def test_a_wrong_reference_names_the_nearest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    register(store, "rows")
    with pytest.raises(UserError, match="did you mean 'rows'"):
        store.resolve("row")
    with pytest.raises(UserError, match="did you mean 'latest'"):
        store.resolve("rows:lates")
    with pytest.raises(UserError, match="nothing is registered"):
        Store(tmp_path / "nowhere").resolve("rows")
    assert not (tmp_path / "nowhere").exists()


def test_aliases_move(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = register(store, "rows", "1"), register(store, "rows", "2")
    store.alias("rows", "best", 2)
    assert store.resolve("rows:best") == second
    store.alias("rows", "best", 1)
    assert store.resolve("rows:best") == first and store.aliases("rows") == {"best": 1}


@pytest.mark.parametrize(("alias", "version"), [("latest", 1), ("v1", 1), ("../x", 1), ("", 1), ("best", 7)])
def test_aliases_that_cant_be(tmp_path: Path, alias: str, version: int) -> None:
    store = Store(tmp_path)
    register(store, "rows")
    with pytest.raises(UserError):
        store.alias("rows", alias, version)


def test_find_by_what_made_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    register(store, "rows", "1", run="r1")
    again = register(store, "rows", "2", run="r2")
    other = register(store, "others", "3", run="r3")
    assert store.find("sha256:f", "data", "rows") == again
    assert store.find("sha256:f", "data", "others") == other
    assert store.find("sha256:f", "model", "rows") is None and store.find("sha256:g", "data", "rows") is None
    assert store.find_output(Producer("sha256:f", "r2", "prep", "data")) == again
    assert store.find_output(Producer("sha256:f", "r9", "prep", "data")) is None
    assert again.identity == Artifact("pending", "data", "rows", producer=again.producer).identity


def test_find_ignores_index_entries_without_a_matching_version(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = register(store, "rows")
    register(store, "rows", fingerprint="sha256:g")
    (folder,) = {p.parent for p in (tmp_path / ".index").glob("*/rows@v1")}
    for lie in ("rows@v2", "rows@v9", "rows@vx", "@v1", "gone@v1"):
        (folder / lie).touch()
    assert store.find("sha256:f", "data", "rows") == made


def test_the_index_can_be_made_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = register(store, "rows")
    for path in sorted((tmp_path / ".index").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert store.find("sha256:f", "data", "rows") is None
    assert store.rebuild_index() == 1
    assert store.find("sha256:f", "data", "rows") == made


@pytest.mark.parametrize("listed", ["as it was", "none", "of another version", "a folder's", "cut"])
def test_verify_sees_every_kind_of_change(tmp_path: Path, listed: str) -> None:
    """It names the file, unless the list of files is not there, or isn't this version's; then it says that."""
    store = Store(tmp_path)
    other, made = register(store, "rows", "other"), register(store, "rows")
    store.verify(made)
    files = Path(made.uri).parent / contents.FILES
    if listed == "none":
        files.unlink()
    elif listed == "of another version":
        files.write_bytes((Path(other.uri).parent / contents.FILES).read_bytes())
    elif listed == "a folder's":
        files.write_text('{"files": ["deep/data.txt"]}')
    elif listed == "cut":
        files.write_bytes(files.read_bytes()[:50])
    file, more = Path(made.uri) / "deep" / "data.txt", Path(made.uri) / "more"
    file.chmod(0o644)
    changes: list[tuple[Callable[[], object], Path, str]] = [
        (lambda: file.write_text("y"), file, "it isn't what was registered"),
        (lambda: file.write_text(""), file, "of its 1 bytes 0 are left"),
        (lambda: (file.write_text("x"), more.touch()), more, "it was not there at registration"),
        (lambda: (more.unlink(), file.unlink()), file, "it is gone"),
    ]
    for change, path, why in changes:
        change()
        with pytest.raises(UserError, match="rows:v2 has changed") as caught:
            store.verify(made)
        first, *rest = caught.value.problems
        assert (first.where, why in first.what) == ((str(path), True) if listed == "as it was" else (made.uri, False))
        assert [problem.where for problem in rest] == ([] if listed in ("as it was", "none") else [str(files)])


def test_verify_compares_the_pinned_digest_too(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = register(store, "rows")
    with pytest.raises(UserError, match="pinned"):
        store.verify(Artifact("store", "data", "rows", version=1, uri=made.uri, digest="sha256:other"))


def test_a_version_shares_no_data_and_is_read_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    source = tmp_path / "weights"
    source.write_text("one")
    staged = store.stage("model")
    os.link(source, staged.content / "weights")
    made = store.commit(staged, kind="model")
    source.write_text("two")
    copy = Path(made.uri) / "weights"
    assert copy.read_text() == "one" and copy.stat().st_nlink == 1 and copy.stat().st_mode & 0o222 == 0
    store.verify(made)


@pytest.mark.parametrize("kind", ["file link", "folder link", "fifo", "nothing"])
def test_content_that_isnt_its_own_is_refused(tmp_path: Path, kind: str) -> None:
    store = Store(tmp_path / "store")
    staged = store.stage("model")
    (tmp_path / "there").mkdir()
    if kind == "fifo":
        os.mkfifo(staged.content / "f")
    elif kind != "nothing":
        (staged.content / "link").symlink_to(tmp_path / "there" if kind == "folder link" else "/etc/hostname")
    with pytest.raises(UserError):
        store.commit(staged, kind="model")
    assert store.names() == []


def test_odd_file_names_survive(tmp_path: Path) -> None:
    store = Store(tmp_path)
    staged = store.stage("odd")
    names = ["a-b", "a/b", "a b", "$(x)", "line\nbreak", "ünï", os.fsdecode(b"\xff\xfe")]
    for name in names:
        (staged.content / name).parent.mkdir(exist_ok=True) if name != "a-b" else None
        (staged.content / name).write_text(name, errors="surrogateescape")
    made = store.commit(staged, kind="data")
    store.verify(made)  # the order of a-b and a/b once differed between the two digests
    (Path(made.uri) / names[-1]).unlink()
    with pytest.raises(UserError, match="it is gone") as caught:
        store.verify(made)
    assert caught.value.problems[0].where == f"{made.uri}/{names[-1]}"


def test_staging_of_living_and_foreign_owners_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mine, foreign = store.stage("rows"), store.stage("rows")
    (foreign.folder / "owner.json").write_text('{"host": "elsewhere", "pid": 1, "boot": "b", "namespace": "n"}')
    store.stage("rows")
    assert mine.content.is_dir() and foreign.content.is_dir()


def test_old_staging_of_an_unknown_owner_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    staged = store.stage("rows")
    (staged.folder / "owner.json").unlink()
    (staged.content / "data").write_text("x")
    now = time.time()
    assert staging.clean(tmp_path, now + staging.OLD / 2) == []
    assert staging.clean(tmp_path, now + staging.OLD + 60) == [staged.folder]
    assert files_below(tmp_path / ".staging") == []


def test_reading_never_writes(tmp_path: Path) -> None:
    store = Store(tmp_path / "nothing")
    assert store.names() == [] and store.versions("a") == [] and store.find("f", "s", "a") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ['{"a', "{}", "\x00"])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    made = register(store, "rows")
    manifest = Path(made.uri).parent / "artifact.json"
    manifest.chmod(0o644)
    manifest.write_text(text)
    for look in (lambda: store.resolve("rows"), lambda: store.describe(made)):
        with pytest.raises(UserError, match="the manifest of rows:v1 is damaged") as caught:
            look()
        assert caught.value.problems[0].where == str(manifest)
