"""The tree from data to a final model, read from the manifests of the store, and three ways to show it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

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
    return _node(store, artifact)


def render_tree(root: Node) -> str:
    """Unicode text; the final artifact on top, what it was made from below. A part met again is not repeated."""
    return "\n".join(_tree_lines(root))


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


def _node(store: Store, artifact: Artifact) -> Node:
    """Depth first, parents before children, every version read once. A chain may be thousands of versions long."""
    known: dict[str, Node] = {}
    read: dict[str, tuple[Node, list[tuple[str, Artifact]]]] = {}  # what a manifest says, its parents still to come
    stack = [artifact]
    while stack:
        top = stack[-1]
        key = Node(top).id
        if key in known:
            stack.pop()
        elif key not in read:
            read[key] = _read(store, top) if top.source == "store" else (Node(top), [])
            stack += [parent for _, parent in read[key][1] if Node(parent).id not in known]
        else:  # its parents are known by now; one that isn't stands further down in the stack
            stack.pop()
            node, parents = read[key]
            cycle = "a cycle: this manifest was changed by hand"
            known[key] = replace(
                node, parents=tuple((name, known.get(Node(p).id) or Node(p, note=cycle)) for name, p in parents)
            )
    return known[Node(artifact).id]


def _read(store: Store, artifact: Artifact) -> tuple[Node, list[tuple[str, Artifact]]]:
    """(the node without its parents, the parents)"""
    try:
        manifest = store.describe(artifact)
    except UserError:
        there = artifact.version in store.versions(artifact.name)
        return Node(artifact, note="its manifest is damaged" if there else "not in this store"), []
    if artifact.digest and manifest["digest"] != artifact.digest:
        return Node(artifact, note=f"this store has other content: {manifest['digest']}"), []
    parents = [
        (p["input"], Artifact.from_tree({k: v for k, v in p.items() if k != "input"})) for p in manifest["parents"]
    ]
    return Node(artifact, (), manifest["created"], tuple(manifest["results"].items())), parents


def _tree_lines(root: Node) -> Iterator[str]:
    shown: set[str] = set()
    stack = [(root, "", "", "")]  # node, what stands before its own line, before the lines of its parents, config key
    while stack:
        node, lead, below, key = stack.pop()
        digest = node.artifact.digest.removeprefix("sha256:")[:12]
        facts = [node.artifact.kind, digest and f"sha256 {digest}", _made_by(node), node.note and f"({node.note})"]
        again = bool(node.parents) and node.id in shown
        if again:
            facts = ["(shown above)"]
        label = printable(node.artifact.label).replace("\n", "\\n")
        yield f"{lead}{key + ': ' if key else ''}{label}  {', '.join(fact for fact in facts if fact)}"
        if again:
            continue
        shown.add(node.id)
        for index, (name, parent) in reversed(list(enumerate(node.parents))):
            last = index == len(node.parents) - 1
            stack.append((parent, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "), name))


def _made_by(node: Node) -> str:
    made: Producer | None = node.artifact.producer
    return f"{made.stage} of {made.run}" if made else ""


def _unique(root: Node) -> list[Node]:
    """Every node once, parents before children."""
    found: dict[str, Node] = {}
    entered: set[str] = set()
    stack = [root]
    while stack:
        node = stack[-1]
        waiting = [parent for _, parent in reversed(node.parents) if parent.id not in found]
        if node.id in entered or not waiting:
            stack.pop()
            found.setdefault(node.id, node)
        else:
            entered.add(node.id)
            stack += waiting
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
