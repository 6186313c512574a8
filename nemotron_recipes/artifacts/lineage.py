"""The tree from data to a final model, read from the manifests of the store, and three ways to show it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import UserError, printable
from nemotron_recipes.spec import Artifact, Producer, Tree


@dataclass(frozen=True)
class Node:
    """One artifact and what it was made from. A root (path, hub, builtin) has no parents.

    parents: (config key, node), in the order of the config
    note: what is wrong with it, e.g. that the store no longer has it
    """

    artifact: Artifact
    parents: tuple[tuple[str, Node], ...] = ()
    created: float | None = None  # seconds since the epoch
    results: tuple[tuple[str, float | None], ...] = ()
    note: str = ""

    @property
    def id(self) -> str:
        """The same artifact met twice has the same id; a path that changed in between hasn't, nor has another kind."""
        return " ".join(filter(None, (self.artifact.kind, self.artifact.label, self.artifact.digest)))


def lineage(store: Store, artifact: Artifact) -> Node:
    """Everything that went into a registered version, back to the sources."""
    return _node(store, artifact, {})


def render_tree(root: Node) -> str:
    """Unicode text; the final artifact on top, what it was made from below. A part met again is not repeated."""
    return "\n".join(_tree_lines(root, "", "", set()))


def render_mermaid(root: Node) -> str:
    """A Mermaid flow chart that reads from data to the final artifact."""
    nodes = _unique(root)
    number = {node.id: f"n{i}" for i, node in enumerate(nodes)}
    lines = ["graph LR"]
    for node in nodes:
        text = _mermaid_text(
            "\n".join(part for part in (node.artifact.label, node.artifact.kind, _made_by(node)) if part)
        )
        lines.append(f'  {number[node.id]}["{text}"]')
    for node in nodes:
        lines += [f'  {number[p.id]} -->|"{_mermaid_text(key)}"| {number[node.id]}' for key, p in node.parents]
    return "\n".join(lines)


def render_json(root: Node) -> str:
    """`nodes` (each once) and `edges` {from, to, input}, from parent to child; `root` is the final artifact's id."""
    nodes = _unique(root)
    edges = [{"from": p.id, "to": node.id, "input": key} for node in nodes for key, p in node.parents]
    return json.dumps(
        {"root": root.id, "nodes": [_plain(n) for n in nodes], "edges": edges}, indent=2, ensure_ascii=False
    )


RENDERERS = {"tree": render_tree, "mermaid": render_mermaid, "json": render_json}


def _node(store: Store, artifact: Artifact, known: dict[str, Node]) -> Node:
    """Depth first; every version is read once. A version is younger than its parents, so there are no cycles."""
    key = Node(artifact).id
    if key not in known:
        known[key] = Node(artifact, note="a cycle: this manifest was changed by hand")
        known[key] = _read(store, artifact, known) if artifact.source == "store" else Node(artifact)
    return known[key]


def _read(store: Store, artifact: Artifact, known: dict[str, Node]) -> Node:
    try:
        manifest = store.describe(artifact)
    except UserError:
        there = artifact.version in store.versions(artifact.name)
        return Node(artifact, note="its manifest is damaged" if there else "not in this store")
    if artifact.digest and manifest["digest"] != artifact.digest:
        return Node(artifact, note=f"this store has other content: {manifest['digest']}")
    parents = []
    for entry in manifest["parents"]:
        key, fields = entry["input"], {name: value for name, value in entry.items() if name != "input"}
        parents.append((key, _node(store, Artifact.from_tree(fields), known)))
    return Node(artifact, tuple(parents), manifest["created"], tuple(manifest["results"].items()))


def _tree_lines(node: Node, lead: str, below: str, shown: set[str], key: str = "") -> Iterator[str]:
    """lead: what stands before this node's own line; below: before the lines of its parents."""
    digest = node.artifact.digest.removeprefix("sha256:")[:12]
    facts = [node.artifact.kind, digest and f"sha256 {digest}", _made_by(node), node.note and f"({node.note})"]
    again = bool(node.parents) and node.id in shown
    if again:
        facts = ["(shown above)"]
    label = printable(node.artifact.label).replace("\n", "\\n")
    yield f"{lead}{key + ': ' if key else ''}{label}  {', '.join(fact for fact in facts if fact)}"
    if again:
        return
    shown.add(node.id)
    for index, (name, parent) in enumerate(node.parents):
        last = index == len(node.parents) - 1
        yield from _tree_lines(
            parent, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "), shown, name
        )


def _made_by(node: Node) -> str:
    made: Producer | None = node.artifact.producer
    return f"{made.stage} of {made.run}" if made else ""


def _unique(root: Node) -> list[Node]:
    """Every node once, parents before children."""
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.id not in found:
            for _, parent in node.parents:
                visit(parent)
            found[node.id] = node

    visit(root)
    return list(found.values())


def _plain(node: Node) -> Tree:
    artifact = node.artifact
    made = artifact.producer
    return {
        "id": node.id,
        "label": artifact.label,
        "source": artifact.source,
        "kind": artifact.kind,
        "name": artifact.name,
        "version": artifact.version,
        "revision": artifact.revision,
        "digest": artifact.digest,
        "uri": artifact.uri,
        "created": node.created,
        "results": dict(node.results),
        "producer": {"run": made.run, "stage": made.stage, "slot": made.slot, "fingerprint": made.fingerprint}
        if made
        else None,
        "note": node.note,
    }


def _mermaid_text(text: str) -> str:
    """Inside a quoted label Mermaid reads entities; quotes, angle brackets and markdown must not act."""
    escaped = "".join(
        c if c.isalnum() or c in " .:_-/@,()" else f"#{ord(c)};" for c in printable(text).replace("\n", "\0")
    )
    return escaped.replace("#0;", "<br/>")
