"""The graph from data to models, with the runs between, as SVG: networkx orders it, matplotlib draws it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

from nemotron_recipes.artifacts.lineage import Node, render_json
from nemotron_recipes.errors import printable
from nemotron_recipes.report.plots import drawing

COLOURS = {"data": "#dcefd9", "model": "#dbe7f7", "run": "#f4f0e4", "tokenizer": "#eee4f2", "template": "#eee4f2"}
WIDTH, HEIGHT, GAP_X, GAP_Y = 2.5, 0.66, 0.5, 0.24  # inches of a box, and between boxes
LONGEST = 32  # characters a line in a box


@dataclass(frozen=True)
class Box:
    """One thing in the graph. `anchor` is the id of what the page says about it; kind chooses the colour."""

    id: str
    kind: str
    lines: tuple[str, ...]
    anchor: str = ""


def lineage_graph(root: Node) -> tuple[list[Box], list[tuple[str, str]]]:
    """(boxes, edges from -> to) of everything that went into an artifact; who made it stands between."""
    tree = json.loads(render_json(root))
    boxes: dict[str, Box] = {}
    edges: list[tuple[str, str]] = []
    made_by: dict[str, str] = {}
    for node in tree["nodes"]:
        digest = node["digest"].removeprefix("sha256:")[:12]
        boxes[node["id"]] = Box(node["id"], node["kind"], (node["label"], digest or node["kind"]), anchor(node["id"]))
        if node["producer"]:
            run = f"run {node['producer']['run']}/{node['producer']['stage']}"
            lines = (node["producer"]["stage"], node["producer"]["run"])
            boxes.setdefault(run, Box(run, "run", lines, anchor(node["id"])))
            made_by[node["id"]] = run
            edges.append((run, node["id"]))
    for edge in tree["edges"]:
        edges.append((edge["from"], made_by.get(edge["to"], edge["to"])))
    return list(boxes.values()), list(dict.fromkeys(edges))


def anchor(text: str) -> str:
    """An id for a place in a page: letters and digits alone."""
    import hashlib

    return "a" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def draw_graph(boxes: list[Box], edges: list[tuple[str, str]]) -> str:
    """An `<svg>` element, read from left (sources) to right. A box is a link to its anchor. No edges may form a circle
    but those that a manifest changed by hand makes; these are left out."""
    matplotlib, figure_class = drawing()
    columns = _columns(boxes, edges)
    where = {
        id: (x * (WIDTH + GAP_X), ((len(column) - 1) / 2 - y) * (HEIGHT + GAP_Y))
        for x, column in enumerate(columns)
        for y, id in enumerate(column)
    }
    wide = len(columns) * (WIDTH + GAP_X)
    high = max(len(column) for column in columns) * (HEIGHT + GAP_Y) + GAP_Y
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemotron", "text.parse_math": False}):
        from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

        figure = figure_class(figsize=(wide, high))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-GAP_X / 2, wide - GAP_X / 2)
        axes.set_ylim(-high / 2, high / 2)
        for start, end in edges:
            a, b = where[start], where[end]
            axes.add_patch(
                FancyArrowPatch(
                    *((a[0] + WIDTH, a[1]), (b[0], b[1])),
                    arrowstyle="-|>",
                    connectionstyle="arc3,rad=0",
                    mutation_scale=9,
                    color="#777777",
                    linewidth=0.9,
                )
            )
        for box in boxes:
            x, y = where[box.id]
            patch = FancyBboxPatch(
                *((x, y - HEIGHT / 2), WIDTH, HEIGHT),
                boxstyle="round,pad=0.02,rounding_size=0.08",
                facecolor=COLOURS.get(box.kind, "#eeeeee"),
                edgecolor="#555555",
                linewidth=0.8,
            )
            if box.anchor:
                patch.set_url(f"#{box.anchor}")
            axes.add_patch(patch)
            step = HEIGHT / (len(box.lines) + 1)
            for number, line in enumerate(box.lines):
                weight = "bold" if number == 0 else "normal"
                place = (x + WIDTH / 2, y + HEIGHT / 2 - step * (number + 1))
                axes.text(*place, _fit(line), ha="center", va="center", fontsize=9.5, weight=weight)
        return as_element(figure)


def as_element(figure: Any) -> str:
    """A figure as an `<svg>` element that can stand in a page."""
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    text = picture.getvalue().decode()
    return text[text.index("<svg") :]


def _columns(boxes: list[Box], edges: list[tuple[str, str]]) -> list[list[str]]:
    """Ids from left to right: everything stands right of what it came from, near its parents' height."""
    networkx = _networkx()
    graph = networkx.DiGraph()
    graph.add_nodes_from(box.id for box in boxes)
    graph.add_edges_from(edges)
    while not networkx.is_directed_acyclic_graph(graph):
        circle = networkx.find_cycle(graph)
        graph.remove_edge(*circle[-1][:2])
        edges.remove(circle[-1][:2])
    level = {id: number for number, column in enumerate(networkx.topological_generations(graph)) for id in column}
    for id in [id for id in level if not graph.pred[id] and graph.succ[id]]:  # a source stands beside its first user
        level[id] = min(level[child] for child in graph.successors(id)) - 1
    columns = [[id for id in level if level[id] == number] for number in range(max(level.values()) + 1)]
    height: dict[str, float] = {}
    for column in columns:
        for id in column:
            parents = [height[parent] for parent in graph.predecessors(id)]
            height[id] = sum(parents) / len(parents) if parents else len(height)
        column.sort(key=lambda id: height[id])
        height.update({id: float(number) for number, id in enumerate(column)})
    return columns


def _fit(line: str) -> str:
    text = printable(line).replace("\n", " ")
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2 - 1]}...{text[-LONGEST // 2 + 2 :]}"


def _networkx() -> Any:
    import networkx

    return networkx
