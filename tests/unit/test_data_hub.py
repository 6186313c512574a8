"""Sources on the hub: which files they have, what is read as it stands in them, and what goes through `datasets`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfFileSystem

from nemotron_recipes.data import remote
from nemotron_recipes.data.blend import read_blend
from nemotron_recipes.data.cuts import cut_inputs
from nemotron_recipes.data.files import open_input
from nemotron_recipes.data.hub_rows import hub_files
from nemotron_recipes.data.job import Hub, Job, Report
from nemotron_recipes.data.prepare import prepare
from nemotron_recipes.data.readers import read_shard
from nemotron_recipes.data.settings import read_settings
from nemotron_recipes.data.shards import Shard
from nemotron_recipes.errors import UserError
from tests.helpers.cli import nemotron
from tests.helpers.data_prep import TEMPLATE, chat, tiny_folder, write_rows
from tests.helpers.hub_server import COMMIT, HubServer

CARD = """\
---
configs:
- config_name: default
  data_files:
  - {split: tool_calling, path: data/tool_calling.jsonl}
  - {split: infinibyte_part00, path: data/infinibyte.part_00.jsonl}
---
"""


def many(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [chat(f"What is {n}?", f"It is {n}.") for n in range(start, start + count)]


def calling(name: str, value: object) -> dict[str, Any]:
    """A row whose tool has a parameter of this name: each row's objects have other fields."""
    properties = {name: {"type": "string"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    row = chat("Call it.", "")
    row["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {name: value}}}]
    return {**row, "tools": [tool]}


def as_published(folder: Path) -> dict[str, bytes]:
    """Like NVIDIA's SFT sets: splits in files of other names, with other columns, and a field whose type changes."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    write_rows(folder / "data" / "tool_calling.jsonl", [calling("a", "1"), calling("b", 2), {"messages": 7}])
    others = [{**row, "difficulty": [None, "hard", 3][n % 3], "tools": "[]"} for n, row in enumerate(many(5))]
    write_rows(folder / "data" / "infinibyte.part_00.jsonl", others)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepared(repo: Path, output: Path, **source: Any) -> Report:
    tree = {"path": "hf://some/where", "hub_split": "all", "split": "train", **source}
    settings = read_settings({"sources": [tree], "tokenizer": "tiny", "pack_size": 4096, "workers": 1}, "sft")
    output.mkdir()
    return prepare(Job("sft", settings, (Hub(str(repo), None),), tiny_folder(), TEMPLATE), output)


def test_json_lines_are_read_as_they_stand(tmp_path: Path) -> None:
    """`datasets` ends at the first row of the second split, and fills up the arguments of every call."""
    as_published(tmp_path / "repo")
    report = prepared(tmp_path / "repo", tmp_path / "out")
    assert [(one["identity"]["split"], one["identity"]["file"], one["rows_read"], one["rows_written"])
            for one in report.sources[0]["files"]] == [
        ("tool_calling", "tool_calling.jsonl", 3, 2), ("infinibyte_part00", "infinibyte.part_00.jsonl", 5, 5)
    ]  # fmt: skip
    (bad,) = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").open()]
    assert (bad["file"], bad["line"]) == ("hf://" + str(tmp_path / "repo") + "/tool_calling/tool_calling.jsonl", 3)
    limited = prepared(tmp_path / "repo", tmp_path / "few", rows=4)
    assert [one["rows_read"] for one in limited.sources[0]["files"]] == [3, 1]


@pytest.mark.parametrize("subset", ["infinibyte.part_00", "infinibyte_part00"])
def test_a_subset_may_be_a_file_or_a_split(tmp_path: Path, subset: str) -> None:
    """The blends that NVIDIA publishes name files of a data set that has one configuration."""
    as_published(tmp_path / "repo")
    assert list(hub_files(str(tmp_path / "repo"), subset, None).splits) == ["infinibyte_part00"]
    assert prepared(tmp_path / "repo", tmp_path / "out", subset=subset).total.read == 5
    with pytest.raises(UserError, match="'no-such' not found"):
        hub_files(str(tmp_path / "repo"), "no-such", None)
    with pytest.raises(UserError, match="has no split 'train'") as caught:
        prepared(tmp_path / "repo", tmp_path / "none", hub_split="train")
    assert "tool_calling, infinibyte_part00" in str(caught.value.problems[0].fix)


def test_a_published_blend_from_a_hub(tmp_path: Path) -> None:
    """The real client of the hub, asked for a commit, from a server on this machine. No object is asked for twice."""
    entries = [{"name": "tools", "path": "hf://nvidia/rows", "subset": "tool_calling"},
               {"name": "code", "path": "hf://nvidia/rows", "subset": "infinibyte.part_00", "weight": 2.0}]  # fmt: skip
    blend = tmp_path / "data_blend_raw.json"
    blend.write_text(json.dumps({"_disabled_datasets_comment": "one is broken", "datasets": entries}))
    assert [source["name"] for source in read_blend(blend, "sft")] == ["tools", "code"]
    with HubServer({"nvidia/rows": as_published(tmp_path / "repo")}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        words = ("data.tokenizer=tiny", "data.splits={train: 1.0, validation: 0.0, test: 0.0}", "data.workers=1")
        nemotron(tmp_path, "nano3", "data", "prep", "sft", f"data.blend={blend}", *words, **environment)
        asked = [path for method, path, _ in hub.asked if method == "GET" and path.endswith(".jsonl")]
    assert sorted(asked) == [f"/datasets/nvidia/rows/resolve/{COMMIT}/data/{name}.jsonl"
                             for name in ("infinibyte.part_00", "tool_calling")]  # fmt: skip
    (file,) = (tmp_path / "nemotron-output" / "store").rglob("metadata.json")
    metadata = json.loads(file.read_text())
    assert [source["sequences_written"] for source in metadata["sources"]] == [2, 10]
    assert metadata["sources"][1]["files"][0]["identity"] == {
        "name": "nvidia/rows", "revision": COMMIT, "subset": "infinibyte.part_00",
        "split": "infinibyte_part00", "file": "infinibyte.part_00.jsonl",
    }  # fmt: skip


def test_a_range_that_is_ignored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client takes the whole file for a piece from its middle: rows would come twice, and torn."""
    content = b"".join(b'{"n": %d, "text": "%s"}\r\n' % (n, b"x" * 200) for n in range(15_000)) + b'{"n": -1}'
    with HubServer({"some/rows": {"a.jsonl": content}}) as hub:
        files = HfFileSystem(endpoint=hub.url, use_listings_cache=False, skip_instance_cache=True)
        monkeypatch.setattr(remote, "filesystem", lambda place: files)
        monkeypatch.setattr(remote, "_READ_AHEAD", 1 << 20)
        place = f"hf://datasets/some/rows@{COMMIT}/a.jsonl"
        shards = cut_inputs(0, [open_input(place)], None, 1 << 20)
        values = [line.value["n"] for shard in shards for line in read_shard(shard)]
        assert values == [*range(15_000), -1]
        hub.fail["a.jsonl"] = ["", "whole"]
        with pytest.raises(UserError, match=r"asked for the bytes \d+ to \d+, it gives"):
            list(read_shard(replace(shards[0], hi=len(content))))


def parquet(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    folder.mkdir()
    for number, name in enumerate(("train", "test")):
        datasets.Dataset.from_list(many(3 + number, start=10 * number)).to_parquet(str(folder / f"{name}.parquet"))
    return folder


def test_other_formats_come_through_datasets(tmp_path: Path) -> None:
    """`datasets` reads a local folder of parquet as it reads the hub."""
    shard = Shard(0, 0, "hub", "hf://some/where", str(parquet(tmp_path / "repo")), limit=2, task=("", "train"))
    lines = list(read_shard(shard))
    assert [line.value["messages"] for line in lines] == [row["messages"] for row in many(2)]
    assert [line.number for line in lines] == [1, 2]
    with pytest.raises(UserError, match="hub_split"):
        list(read_shard(replace(shard, task=("", "nope"))))


def test_all_splits_and_the_first_rows_of_all(tmp_path: Path) -> None:
    """One after another, each with its own counts; a source's `rows` are of the source, not of each split."""
    repo = parquet(tmp_path / "repo")
    for rows, found in ((None, [("train", 3), ("test", 4)]), (3, [("train", 3)]), (5, [("train", 3), ("test", 2)])):
        (source,) = prepared(repo, tmp_path / f"out-{rows}", rows=rows).sources
        assert [(one["identity"]["split"], one["rows_written"]) for one in source["files"]] == found


def test_a_missing_datasets_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'nemotron-recipes\[data\]'"):
        hub_files("some/where", None, "0" * 40)
