"""`nemotron plan layouts`: which layouts a stage could have on so many GPUs. Reads only; the data need not be there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.backends import get_backend
from nemotron_recipes.config.catalog import Catalog
from nemotron_recipes.config.compose import compose
from nemotron_recipes.config.profiles import Environment
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.planning.estimate import capacity_of
from nemotron_recipes.planning.resolve import Resolver
from nemotron_recipes.planning.validate import validate
from nemotron_recipes.sizing import search, tables
from nemotron_recipes.sizing.search import Candidate
from nemotron_recipes.sizing.stage import sized
from nemotron_recipes.spec import Request, Tree

PER_NODE = 8  # GPUs of a node where nobody says how many
_PLACE = ("nodes", "nproc_per_node", "gpu", "gpu_memory_gib")


@dataclass(frozen=True)
class Layouts:
    """What was found, best first. capacity: bytes of one GPU, None where nobody says; beside: what else is wrong."""

    model: str
    nodes: int
    per_node: int
    capacity: float | None
    found: list[Candidate]
    beside: list[Problem]


def layouts(request: Request, catalog: Catalog, environment: Environment) -> Layouts:
    """Layouts of a training stage. UserError: it is none, its model's shape is not known, or none keeps every rule."""
    path = catalog.require(request.family, request.words, request.config)
    profile = (request.profile, environment.profile(request.profile)) if request.profile else None
    composed = compose(catalog, path, request.overrides, profile)
    given = composed.tree.get("run")
    place = {key: given[key] for key in _PLACE if key in given} if isinstance(given, dict) else {}
    # How many GPUs is what is asked here: an executor that has no more than one node has no say in it.
    run = {} if not isinstance(given, dict) else {key: value for key, value in given.items() if key not in _PLACE}
    config, problems = validate(replace(composed, tree={**composed.tree, "run": run}), path, ("train",))
    if problems:
        raise UserError(*problems)
    nodes, per_node = (_count(place, key, least) for key, least in (("nodes", 1), ("nproc_per_node", PER_NODE)))
    capacity, problems = capacity_of(place)
    resolver = Resolver(Store(environment.store), Path(request.cwd), catalog.makers, offline=True)
    model = resolver.resolve(config["model"]["path"], "model")
    shape = tables.shape_of(model, config["model"]["arch"])
    if shape is None:
        what = f"the shape of {model.label} is not known: its config.json can't be read"
        problems.append(Problem(what, "model.path", "name a local folder, or fetch it into the hub's cache"))
    size = sized(config, shape, nodes * per_node, None) if shape else None
    if shape and size is None:
        what = f"what {config['method']} takes with backend {config['backend']['name']} is not estimated"
        problems.append(Problem(what, "backend.name"))
    if problems:
        raise UserError(*problems)
    assert size is not None
    found, beside = search.search(config, get_backend(config["backend"]["name"]), size, nodes, per_node, capacity)
    if not found:
        what = f"no layout of {size.shape.name} on {nodes} x {per_node} GPUs keeps every rule"
        raise UserError(*beside, Problem(what, fix="another number of GPUs, or another train.global_batch_size"))
    return Layouts(size.shape.name, nodes, per_node, capacity, found, beside)


def _count(place: Tree, key: str, default: int) -> int:
    value: Any = place.get(key, default)
    if type(value) is not int or value < 1:
        raise UserError(Problem(f"run.{key} should be a whole number above 0, not {value!r}", "command line"))
    return value
