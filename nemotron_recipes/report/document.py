"""report.md of a version, and release notes between two: Markdown from manifests, run folders and data cards."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.lineage import Node, render_mermaid
from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import printable
from nemotron_recipes.report import compare
from nemotron_recipes.spec import Artifact, Tree

CARD = "data-card.md"  # in the content of a data version (data/card.py)
CURVES = "curves.svg"


def report(store: Store, artifact: Artifact, root: Node, view: RunView | None, curves: bool) -> str:
    """All that is known of a version. view: the run that made it, None where its folder is gone; curves: a picture of
    that name lies beside the report."""
    manifest = store.describe(artifact)
    made = manifest["producer"]
    facts: list[tuple[str, Any]] = [
        ("kind", manifest["kind"]),
        ("digest", manifest["digest"]),
        ("size", f"{manifest['size']} bytes in {manifest['files']} files"),
        ("created", datetime.fromtimestamp(manifest["created"], timezone.utc).isoformat(timespec="seconds")),
        ("folder", artifact.uri),
    ]
    if made:
        facts += [("made by", f"{made['stage']} of {made['run']}"), ("fingerprint", made["fingerprint"])]
    lines = [f"# {_plain(artifact.label)}", "", *_table(("", ""), facts), "", "## Results", ""]
    lines += _table(("result", "value"), manifest["results"].items()) if manifest["results"] else ["None recorded."]
    if curves:
        lines += ["", "## Curves", "", f"![metrics over steps]({CURVES})"]
    for parent in _data_of(manifest):
        lines += ["", *_data_section(store, parent)]
    if view is not None and made:
        lines += ["", *_run_section(view, made["stage"])]
    elif made:
        lines += ["", "## Run", "", f"The folder of run {_plain(made['run'])} is not here: no config, no environment."]
    return "\n".join([*lines, "", "## Lineage", "", "```mermaid", render_mermaid(root), "```", ""])


def release_notes(store: Store, old: Artifact, new: Artifact, views: tuple[RunView | None, RunView | None]) -> str:
    """What changed from one version to another: results, data, config, code, environment."""
    before, after = store.describe(old), store.describe(new)
    lines = [f"# {_plain(new.label)}, compared with {_plain(old.label)}", "", "## Results", ""]
    lines += _changes(before["results"], after["results"]) or ["The same."]
    lines += ["", "## Inputs", ""]
    lines += _changes(_inputs(before), _inputs(after)) or ["The same."]
    for was, is_ in zip(_data_of(before), _data_of(after), strict=False):
        found = _changes(_facts(store, was), _facts(store, is_))
        if was.digest != is_.digest and found:
            lines += ["", f"### {_plain(was.label)} -> {_plain(is_.label)}", "", *found]
    if views[0] is None or views[1] is None:
        gone = [version.label for version, view in zip((old, new), views, strict=True) if view is None]
        lines += ["", "## Config and code", "", f"Not known: the run folder of {_plain(', '.join(gone))} is not here."]
        return "\n".join([*lines, ""])
    stages = (before["producer"]["stage"], after["producer"]["stage"])
    for section, rows in compare.stage_differences((views[0], stages[0]), (views[1], stages[1])).items():
        lines += ["", f"## {section.capitalize()}", ""]
        lines += (
            _table(("", "before", "after"), ((key, *pair) for key, pair in rows.items())) if rows else ["The same."]
        )
    return "\n".join([*lines, ""])


def _run_section(view: RunView, stage: str) -> list[str]:
    lines = ["## Run", "", *_table(("", ""), [("id", view.id), ("command", view.command)])]
    code = view.plan.get("code", {})
    lines += [
        "",
        "Code: "
        + ", ".join(f"{key} {_plain(code[key])}" for key in ("version", "git_commit", "digest") if code.get(key)),
    ]
    planned = next((s for s in view.plan["stages"] if s["name"] == stage), None)
    if planned is not None:
        values = compare.flatten(planned["config"])
        origins = {key: f"{origin['kind']} {origin['source']}".strip() for key, origin in planned["changed"].items()}
        rows = [(key, values.get(key), origins[key]) for key in sorted(origins)]
        lines += ["", "### Config that differs from the recipe's base", ""]
        lines += _table(("key", "value", "layer"), rows) if rows else ["None."]
        environment = compare.environment_of(view, view.stage(stage))
        if environment:
            packages = environment.get("packages", {})
            libraries = [name for name in ("torch", "transformers", "trl", "peft", "datasets") if name in packages]
            facts = {key: environment.get(key) for key in ("host", "platform", "cpus", "python")}
            facts |= {name: packages[name] for name in libraries}
            lines += ["", "### Environment", "", *_table(("", ""), facts.items())]
    return lines


def _data_section(store: Store, artifact: Artifact) -> list[str]:
    lines = [f"## Data: {_plain(artifact.label)}", "", *_table(("", ""), _facts(store, artifact).items())]
    card = Path(artifact.uri) / CARD
    if card.is_file():
        text = printable(card.read_text(encoding="utf-8", errors="replace"))
        lines += ["", re.sub(r"^#", "###", text, flags=re.MULTILINE)]
    return lines


def _facts(store: Store, artifact: Artifact) -> Tree:
    """digest, results and metadata of a data version, flat."""
    if artifact.source != "store":
        return {"digest": artifact.digest}
    manifest = store.describe(artifact)
    told = {**compare.flatten(manifest["results"]), **compare.flatten(manifest["metadata"])}
    return {"digest": manifest["digest"], **{key: v for key, v in told.items() if not isinstance(v, (list, dict))}}


def _data_of(manifest: Tree) -> list[Artifact]:
    return [parent for parent in _parents(manifest).values() if parent.kind == "data" and parent.source == "store"]


def _inputs(manifest: Tree) -> Tree:
    return {key: f"{a.label} {a.digest.removeprefix('sha256:')[:12]}".strip() for key, a in _parents(manifest).items()}


def _parents(manifest: Tree) -> dict[str, Artifact]:
    return {p["input"]: Artifact.from_tree({k: v for k, v in p.items() if k != "input"}) for p in manifest["parents"]}


def _changes(before: Tree, after: Tree) -> list[str]:
    rows = []
    for key in dict.fromkeys([*before, *after]):
        was, is_ = before.get(key), after.get(key)
        if was != is_:
            change = f"{is_ - was:+.4g}" if isinstance(was, (int, float)) and isinstance(is_, (int, float)) else ""
            rows.append((key, was, is_, change))
    return _table(("", "before", "after", "change"), rows) if rows else []


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    names = list(header)
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return lines + [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows]


def _plain(value: Any) -> str:
    """Text that neither Markdown nor HTML acts on, on one line."""
    if value is None:
        return "-"
    text = printable(f"{value:.6g}" if isinstance(value, float) else str(value)).replace("\n", " ")
    return re.sub(r"([\\`*\[\]<>|&])", lambda found: f"&#{ord(found[1])};", text)
