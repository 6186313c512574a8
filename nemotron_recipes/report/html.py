"""Self-contained pages: no script, no network, nothing beside the file. All text from outside is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.lineage import Node, render_json
from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.artifacts.stages import StageView, tail
from nemotron_recipes.errors import printable
from nemotron_recipes.report import compare
from nemotron_recipes.report.graph import Box, anchor, draw_graph, lineage_graph
from nemotron_recipes.report.plots import draw_metrics, metric_names
from nemotron_recipes.spec import Artifact, Tree

TAIL = 60  # lines of a log
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PANELS = 9  # metrics that are seen at once; the others are folded up
STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 88em; padding: 0 1.5em; color: #222;
  background: #fff; }
h1 { font-size: 1.5em; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; border-bottom: 1px solid #8884; margin-top: 2em; overflow-wrap: anywhere; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: .8em 0; }
td, th { text-align: left; padding: .15em 1em .15em 0; vertical-align: top; min-width: 3em; }
th { font-weight: 600; color: #666; white-space: nowrap; } td { overflow-wrap: break-word; max-width: 60em; }
td:first-child, .narrow td { white-space: nowrap; } td:last-child { min-width: 14em; }
.narrow td:last-child { min-width: 3em; }
pre { background: #8881; padding: .8em; overflow-x: auto; font-size: 12px; }
.picture { overflow-x: auto; background: #fff; border-radius: 6px; margin: .8em 0; } a { color: #1558b0; }
svg { max-width: max(100%, 60em); height: auto; display: block; margin: auto; }
.succeeded, .reused { color: #1a7f37; } .failed, .lost { color: #c62828; } .cancelled { color: #9a6700; }
:target { background: #ffd33d40; } summary { cursor: pointer; }
@media (max-width: 40em) {
  body { margin: 1em auto; padding: 0 .8em; } td { overflow-wrap: anywhere; } td:last-child { min-width: 10em; }
}
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd; } th { color: #aaa; } a { color: #8ab4f8; }
  .succeeded, .reused { color: #57c46f; } .failed, .lost { color: #ff7b72; } .cancelled { color: #e3b341; }
}
"""


def lineage_page(root: Node) -> str:
    """What an artifact came from: the graph, then each artifact and path with what is known of it."""
    tree = json.loads(render_json(root))
    label = {node["id"]: node["label"] for node in tree["nodes"]}
    parts = [_picture(draw_graph(*lineage_graph(root)))]
    for node in reversed(tree["nodes"]):
        rows: list[tuple[str, Any]] = [("kind", node["kind"]), ("digest", node["digest"]), ("where", node["uri"])]
        if node["created"]:
            rows.append(("created", _time(node["created"])))
        if node["producer"]:
            rows.append(("made by", f"{node['producer']['stage']} of {node['producer']['run']}"))
            rows.append(("fingerprint", node["producer"]["fingerprint"]))
        rows += [(f"result {key}", value) for key, value in node["results"].items()]
        rows += _gates(node)
        rows += [("note", node["note"])] if node["note"] else []
        links = [
            f'<tr><th>{_text(edge["input"])}</th><td><a href="#{anchor(edge["from"])}">{_text(label[edge["from"]])}</a>'
            for edge in tree["edges"]
            if edge["to"] == node["id"]
        ]
        known = _rows([row for row in rows if row[1] != ""], links)
        parts.append(f'<h2 id="{anchor(node["id"])}">{_text(node["label"])}</h2>{known}')
    return page(f"Lineage of {label[tree['root']]}", parts)


def run_page(view: RunView) -> str:
    """A run: how it ended, its graph, curves, config by layer, environment and the end of its logs."""
    facts = [
        ("state", view.state),
        ("command", view.command),
        ("created", view.created),
        ("folder", view.path),
        ("rerun of", view.plan.get("rerun_of") or ""),
    ]
    parts = [_rows([row for row in facts if row[1]])]
    if view.explanation:
        parts.append(f"<pre>{_text(view.explanation)}</pre>")
    if view.stages:
        header = ("stage", "state", "attempts", "exit", "wall", "steps", "s/step", "tokens/s")
        parts += [_table(header, [_stage_row(view, stage) for stage in view.stages], "narrow")]
        parts += ["<h2>Inputs, stages, outputs</h2>", _picture(draw_graph(*_run_graph(view)))]
    names = metric_names([view])
    if names:
        parts += ["<h2>Curves</h2>", _picture(draw_metrics([view], names=names[:PANELS]).decode())]
    if len(names) > PANELS:
        rest = _picture(draw_metrics([view], names=names[PANELS:]).decode())
        parts.append(f"<details><summary>{len(names) - PANELS} more metrics</summary>{rest}</details>")
    for stage in view.stages:
        parts += _stage_parts(view, stage)
    return page(f"Run {view.id}", parts)


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page; `parts` are HTML."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{_text(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join([f"<h1>{_text(title)}</h1>", *parts])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _stage_row(view: RunView, stage: StageView) -> tuple[Any, ...]:
    figures = compare.step_figures(compare.metrics_of(view, stage.name))
    wall = f"{stage.ended - stage.started:.1f} s" if stage.started and stage.ended else ""
    values = (figures["steps"], figures["seconds_per_step"], figures["tokens_per_second"])
    return (stage.name, stage.state, stage.attempt, stage.exit_code, wall, *values)


def _stage_parts(view: RunView, stage: StageView) -> list[str]:
    planned: Tree = next(s for s in view.plan["stages"] if s["name"] == stage.name)
    parts = [f'<h2 id="{anchor(stage.name)}">Stage {_text(stage.name)}</h2>']
    rows = [("fingerprint", stage.fingerprint), ("note", stage.note)]
    rows += [(f"result {key}", value) for key, value in stage.results.items()]
    for slot, made in stage.outputs.items():
        rows.append((f"output {slot}", f"{made['name']}:v{made['version']} {made['digest']} {made['uri']}"))
    parts.append(_rows([row for row in rows if row[1] != ""]))
    layers = {key: f"{origin['kind']} {origin['source']}".strip() for key, origin in planned["changed"].items()}
    values = compare.flatten(planned["config"])
    changed = [(key, values.get(key), layer) for key, layer in sorted(layers.items())]
    parts.append("<h3>Config: what differs from the recipe's base, and which layer set it</h3>")
    parts.append(_table(("key", "value", "layer"), changed) if changed else "<p>nothing</p>")
    rest = [(key, value) for key, value in values.items() if key not in layers]
    parts.append(f"<details><summary>the rest of the config</summary>{_table(('key', 'value'), rest)}</details>")
    environment = compare.flatten(compare.environment_of(view, stage))
    if environment:
        found = _table(("fact", "value"), environment.items())
        parts.append(f"<details><summary>what it ran on</summary>{found}</details>")
    if stage.log and (lines := tail(Path(stage.log), TAIL)):
        parts.append(f"<h3>End of the log</h3><p>{_text(stage.log)}</p><pre>{_text(chr(10).join(lines))}</pre>")
    return parts


def _run_graph(view: RunView) -> tuple[list[Box], list[tuple[str, str]]]:
    boxes: dict[str, Box] = {}
    edges: list[tuple[str, str]] = []
    planned = {stage["name"]: stage for stage in view.plan["stages"]}

    def add(artifact: Artifact) -> str:
        digest = artifact.digest.removeprefix("sha256:")[:12]
        id = f"{artifact.kind} {artifact.label}"
        boxes.setdefault(id, Box(id, artifact.kind, (artifact.label, digest or artifact.kind)))
        return id

    for stage in view.stages:
        box = Box(f"stage {stage.name}", "run", (stage.name, stage.state), anchor(stage.name))
        boxes[box.id] = box
        exact = [{key: value for key, value in parent.items() if key != "input"} for parent in stage.parents]
        for tree in exact or planned[stage.name]["inputs"].values():
            edges.append((add(Artifact.from_tree(tree)), box.id))
        for slot, made in stage.outputs.items():
            edges.append((box.id, add(Artifact("store", slot, made["name"], made["version"], digest=made["digest"]))))
    return list(boxes.values()), list(dict.fromkeys(edges))


def _link(id: str, label: str) -> str:
    return f'<a href="#{anchor(id)}">{_text(label)}</a>'


def _gates(node: Tree) -> list[tuple[str, Any]]:
    """What the gates of data prep dropped, as the data's own metadata says."""
    if node["source"] != "store" or node["kind"] != "data":
        return []
    try:
        metadata = json.loads((Path(node["uri"]) / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    rows: list[tuple[str, Any]] = [("sources", len(metadata.get("sources", ())))]
    for gate, reasons in metadata.get("gates", {}).items():
        rows += [(f"gate {gate}", f"{reason}: {found.get('rows')} rows") for reason, found in reasons.items()]
    return rows


def _picture(svg: str) -> str:
    return f'<div class="picture">{svg[svg.index("<svg") :]}</div>'


def _rows(rows: Iterable[tuple[str, Any]], more: Sequence[str] = ()) -> str:
    found = [f"<tr><th>{_text(name)}</th><td{_state(value)}>{_text(value)}</td></tr>" for name, value in rows]
    return f"<table>{''.join([*found, *more])}</table>"


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]], look: str = "") -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td{_state(cell)}>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table{f' class={look}' if look else ''}><tr>{head}</tr>{body}</table>"


def _state(value: Any) -> str:
    return f' class="{value}"' if value in ("succeeded", "reused", "failed", "lost", "cancelled") else ""


def _text(value: Any) -> str:
    """Escaped for HTML, and no control characters."""
    if value is None:
        return "-"
    return html.escape(printable(f"{value:.5g}" if isinstance(value, float) else str(value)))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
