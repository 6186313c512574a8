"""The tree from data to a final model, read from the manifests of the store, and three ways to show it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import UserError, printable
from nemotron_recipes.spec import Artifact, Producer, Tree

SHOWN_GENERATIONS = 50  # of a tree on a screen


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

    @cached_property
    def id(self) -> str:
        """The same artifact met twice has the same id; a path that changed in between hasn't, nor has another kind."""
        return _id(self.artifact)


def lineage(store: Store, artifact: Artifact) -> Node:
    """Everything that went into a registered version, back to the sources."""
    return _node(store, artifact)


def render_tree(root: Node) -> str:
    """Unicode text; the final artifact on top, what it was made from below. A part met again is not repeated, and
    generations that no screen has room for are counted."""
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
    found = {"nodes": [_plain(node) for node in nodes], "edges": edges}
    # A line each, by the fast encoder: there may be 10,000 of them.
    lists = (
        f'"{name}": [\n    ' + ",\n    ".join(json.dumps(each, ensure_ascii=False) for each in rows) + "\n  ]"
        for name, rows in found.items()
    )
    return "{\n  " + ",\n  ".join((f'"root": {json.dumps(root.id, ensure_ascii=False)}', *lists)) + "\n}"


RENDERERS = {"tree": render_tree, "mermaid": render_mermaid, "json": render_json}


def _id(artifact: Artifact) -> str:
    return " ".join(filter(None, (artifact.kind, artifact.label, artifact.digest)))


def _node(store: Store, artifact: Artifact) -> Node:
    """Depth first, parents before children, every version read once. A chain may be thousands of versions long."""
    known: dict[str, Node] = {}
    read: dict[str, tuple[Node, list[tuple[str, str, Artifact]]]] = {}  # what a manifest says; parents with their ids
    first = _id(artifact)
    stack = [(first, artifact)]
    while stack:
        key, top = stack[-1]
        if key in known:
            stack.pop()
        elif key not in read:
            node, found = _read(store, top) if top.source == "store" else (Node(top), [])
            parents = [(name, _id(parent), parent) for name, parent in found]
            read[key] = node, parents
            stack += [(of, parent) for _, of, parent in parents if of not in known]
        else:  # its parents are known by now; one that isn't stands further down in the stack
            stack.pop()
            node, parents = read[key]
            cycle = "a cycle: this manifest was changed by hand"
            joined = tuple((name, known.get(of) or Node(p, note=cycle)) for name, of, p in parents)
            known[key] = replace(node, parents=joined) if joined else node
    return known[first]


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
    # node, what stands before its own line, before the lines of its parents, config key, generation
    stack = [(root, "", "", "", 0)]
    while stack:
        node, lead, below, key, generation = stack.pop()
        if generation > SHOWN_GENERATIONS:
            more = len(_unique(node))
            yield f"{lead}... {more} more: nemotron lineage {printable(node.artifact.label)}, or --json for all"
            continue
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
            lines = below + ("└─ " if last else "├─ "), below + ("   " if last else "│  ")
            stack.append((parent, *lines, name, generation + 1))


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
