"""The tree from data to a final model: complete, each artifact once, and safe to show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.lineage import (
    RENDERERS,
    SHOWN_GENERATIONS,
    lineage,
    render_json,
    render_mermaid,
    render_tree,
)
from nemotron_recipes.artifacts.store import SEAL, Store
from nemotron_recipes.spec import Artifact, Producer

RAW = Artifact("path", "data", uri="/data/raw.jsonl", digest="sha256:" + "a" * 64)
TINY = Artifact("builtin", "model", "tiny")
HUB = Artifact("hub", "tokenizer", "org/tok", revision="c" * 40)


def register(store: Store, name: str, kind: str, stage: str, **parents: Artifact) -> Artifact:
    staged = store.stage(name)
    (staged.content / "x").write_text(name)
    return store.commit(
        staged,
        kind=kind,
        producer=Producer(f"sha256:{name}", "run-1", stage, kind),
        parents={key.replace("__", "."): parent for key, parent in parents.items()},
        results={"loss": 0.5},
    )


def unsealed(manifest: str) -> str:
    """As from before manifests had seals."""
    return json.dumps({key: value for key, value in json.loads(manifest).items() if key != SEAL})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """data -> sft -> rl, where rl reads the same data as sft."""
    store = Store(tmp_path)
    rows = register(store, "rows", "data", "data-prep", data__source=RAW, data__tokenizer=HUB)
    sft = register(store, "sft", "model", "sft", model__path=TINY, data__path=rows)
    register(store, "rl", "model", "rl", model__path=sft, data__path=rows)
    return store


def test_tree_reaches_the_sources_and_repeats_nothing(store: Store) -> None:
    text = render_tree(lineage(store, store.resolve("rl")))
    digest = {name: store.resolve(name).digest.removeprefix("sha256:")[:12] for name in ("rl", "sft", "rows")}
    assert text == (
        f"rl:v1  model, sha256 {digest['rl']}, rl of run-1\n"
        f"├─ model.path: sft:v1  model, sha256 {digest['sft']}, sft of run-1\n"
        "│  ├─ model.path: builtin:tiny  model\n"
        f"│  └─ data.path: rows:v1  data, sha256 {digest['rows']}, data-prep of run-1\n"
        "│     ├─ data.source: /data/raw.jsonl  data, sha256 aaaaaaaaaaaa\n"
        f"│     └─ data.tokenizer: hf://org/tok@{'c' * 40}  tokenizer\n"
        "└─ data.path: rows:v1  (shown above)"
    )


def test_json_and_mermaid_have_every_node_once_and_every_edge(store: Store) -> None:
    root = lineage(store, store.resolve("rl"))
    graph = json.loads(render_json(root))
    labels = [node["label"] for node in graph["nodes"]]
    assert sorted(labels) == sorted(["rl:v1", "sft:v1", "rows:v1", "builtin:tiny", RAW.uri, HUB.label])
    of = {node["id"]: node["label"] for node in graph["nodes"]}
    edges = {(of[edge["from"]], of[edge["to"]], edge["input"]) for edge in graph["edges"]}
    assert edges == {
        (RAW.uri, "rows:v1", "data.source"),
        (HUB.label, "rows:v1", "data.tokenizer"),
        ("builtin:tiny", "sft:v1", "model.path"),
        ("rows:v1", "sft:v1", "data.path"),
        ("sft:v1", "rl:v1", "model.path"),
        ("rows:v1", "rl:v1", "data.path"),
    }
    assert of[graph["root"]] == "rl:v1"
    chart = render_mermaid(root)
    assert chart.count('["') == 6 and chart.count("-->") == 6


def test_a_chain_may_be_long(tmp_path: Path) -> None:
    """Each version continues the one before: more of them than Python has stack frames."""
    store = Store(tmp_path)
    newest = first = register(store, "model", "model", "sft")
    for _ in range(40):
        newest = register(store, "model", "model", "sft", model__path=newest)
    manifest = json.loads((tmp_path / "model/v41/artifact.json").read_text())
    for version in range(42, 1500):
        folder = tmp_path / "model" / f"v{version}"
        folder.mkdir()
        parent = {**manifest["parents"][0], "version": version - 1}
        (folder / "artifact.json").write_text(
            unsealed(json.dumps({**manifest, "version": version, "parents": [parent]}))
        )
    root = lineage(store, store.resolve("model"))
    assert len(json.loads(render_json(root))["nodes"]) == 1499
    lines = render_tree(root).splitlines()
    assert len(lines) == SHOWN_GENERATIONS + 2, "a screen has no room for more"
    assert lines[-1].strip() == "└─ ... 1448 more: nemotron lineage model:v1448, or --json for all"
    assert (
        render_tree(lineage(store, store.resolve("model:v40")))
        .splitlines()[-1]
        .strip()
        .startswith(f"└─ model.path: {first.label} ")
    )


def test_a_name_that_stands_for_a_model_and_for_a_tokenizer_stays_two_things(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tokenizer = Artifact("builtin", "tokenizer", "tiny")
    root = lineage(store, register(store, "sft", "model", "sft", model__path=TINY, model__tokenizer=tokenizer))
    assert render_tree(root).splitlines()[1:] == [
        "├─ model.path: builtin:tiny  model",
        "└─ model.tokenizer: builtin:tiny  tokenizer",
    ]


def test_a_parent_that_is_gone_or_another_one_is_named(store: Store, tmp_path: Path) -> None:
    root = store.resolve("rl")
    manifest = tmp_path / "sft" / "v1" / "artifact.json"
    text = manifest.read_text()
    changed = text.replace(store.resolve("sft").digest, "sha256:other")
    manifest.write_text(changed)
    assert "its manifest is damaged" in render_tree(lineage(store, root))
    manifest.write_text(unsealed(changed))
    assert "this store has other content: sha256:other" in render_tree(lineage(store, root))
    manifest.unlink()
    assert "sft:v1  model" in (tree := render_tree(lineage(store, root))) and "not in this store" in tree


def test_a_manifest_changed_by_hand_into_a_cycle_ends(store: Store, tmp_path: Path) -> None:
    manifest = tmp_path / "rows" / "v1" / "artifact.json"
    tree = json.loads(manifest.read_text())
    child = json.loads((tmp_path / "sft" / "v1" / "artifact.json").read_text())["parents"][1]
    tree["parents"] = [{**child, "input": "data.source"}]  # rows made from rows
    manifest.write_text(unsealed(json.dumps(tree)))
    assert "a cycle" in render_tree(lineage(store, store.resolve("rl")))


@pytest.mark.parametrize("form", sorted(RENDERERS))
def test_hostile_names_dont_act(tmp_path: Path, form: str) -> None:
    store = Store(tmp_path)
    evil = Artifact("path", "data", uri='/a\x1b[2J\n├─ x"]; click n0 "javascript:x" <b>', digest="sha256:1")
    text = RENDERERS[form](lineage(store, register(store, "rows", "data", "prep", p=evil)))
    assert "\x1b" not in text
    if form == "tree":
        assert len(text.splitlines()) == 2
    elif form == "mermaid":
        assert len(text.splitlines()) == 4 and "<b>" not in text and 'x"' not in text
    else:
        assert evil.uri in [node["label"] for node in json.loads(text)["nodes"]]
