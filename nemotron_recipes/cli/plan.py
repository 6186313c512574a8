"""`nemotron plan`: what could be run, before anything is."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from nemotron_recipes.cli.estimate_text import VERDICTS, gib
from nemotron_recipes.cli.text import table
from nemotron_recipes.config.catalog import Catalog, config_roots
from nemotron_recipes.errors import Problem, UserError, nearest, printable
from nemotron_recipes.spec import Request

SHOWN = 15


@click.group()
def plan() -> None:
    """Look at what could be run, before anything is."""


@plan.command()
@click.argument("words", nargs=-1, required=True, metavar="FAMILY STAGE [KEY=VALUE]...")
@click.option("-c", "--config", default="default", metavar="NAME", help="Config of the stage  [default: default]")
@click.option("-p", "--profile", metavar="PROFILE", help="Nodes, processes and GPU of a profile of env.toml.")
@click.option("--all", "everything", is_flag=True, help=f"All of them, not the {SHOWN} best.")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def layouts(words: tuple[str, ...], config: str, profile: str | None, everything: bool, as_json: bool) -> int:
    """List layouts that keep every rule, ranked.

    First what fits into a GPU's memory with its margin, then what is split least: pipeline, context, tensor, expert
    tensor, experts beyond a node, experts; then the most memory left. run.nodes and run.nproc_per_node (8 where nobody
    says) are the GPUs, run.gpu or run.gpu_memory_gib what one holds.

    \b
      nemotron plan layouts nano3 sft run.nodes=4 run.gpu=H100
    """
    from nemotron_recipes import lifecycle
    from nemotron_recipes.config.profiles import read_environment
    from nemotron_recipes.planning.layouts import layouts as find

    request = _request(words, config, profile)
    with lifecycle.site_of(request.profile, read_environment()) as (site, _):
        found = find(request, Catalog(config_roots()), site)
    rows = [_row(one, found.capacity) for one in found.found]
    if as_json:
        told = {"model": found.model, "nodes": found.nodes, "nproc_per_node": found.per_node, "layouts": rows}
        click.echo(json.dumps({**told, "beside": [problem.what for problem in found.beside]}, indent=2))
        return 0
    capacity = f" of {gib(found.capacity)}" if found.capacity else "; run.gpu=H100 says how large a GPU is"
    click.echo(f"{found.model} on {found.nodes} x {found.per_node} GPUs{capacity}: {len(rows)} layout(s), best first")
    shown = rows if everything else rows[:SHOWN]
    header = ("TP", "PP", "CP", "EP", "ETP", "SP", "DP", "NEEDED", "MARGIN", "")
    click.echo(table(header, [_cells(row) for row in shown]))
    if len(shown) < len(rows):
        click.echo(f"... and {len(rows) - len(shown)} more: --all")
    if found.found[0].overrides:
        click.echo(f"\nthe first one: {' '.join(found.found[0].overrides)}")
    for problem in found.beside:
        click.echo(printable(f"beside: {problem.what}"))
    return 0


def _request(words: tuple[str, ...], config: str, profile: str | None) -> Request:
    family, *rest = words
    stage = tuple(word for word in rest if "=" not in word and word[:1] not in "+~")
    overrides = tuple(word for word in rest if word not in stage)
    catalog = Catalog(config_roots())
    if family not in catalog.families:
        raise UserError(Problem(f"unknown family '{family}'", "command line", nearest(family, catalog.families)))
    if not stage or not catalog.configs(family, *stage):
        stages = [" ".join(known) for known in catalog.stages(family)]
        what = f"{family} has no stage '{' '.join(stage)}'" if stage else "no stage is named"
        raise UserError(Problem(what, "command line", nearest(" ".join(stage), stages)))
    return Request(family, stage, config, profile=profile, overrides=overrides, offline=True, cwd=os.getcwd())


def _row(one: Any, capacity: float | None) -> dict[str, Any]:
    from dataclasses import asdict

    parts = {name: round(value) for name, value in asdict(one.memory).items()}
    return {
        "parallel": one.layout.settings,
        "data_parallel_size": one.layout.data,
        "needed": round(one.memory.needed),
        "margin": parts.pop("margin"),
        "parts": parts,
        "capacity": round(capacity) if capacity else None,
        "verdict": one.verdict,
    }


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    sizes = list(row["parallel"].values())
    verdict = VERDICTS[row["verdict"]] if row["verdict"] else ""
    yes = "yes" if sizes[5] else "no"
    return (*sizes[:5], yes, row["data_parallel_size"], gib(row["needed"]), gib(row["margin"]), verdict)
