"""Where a stage runs, and on how many processes: what a validated config says in `run`."""

from __future__ import annotations

from collections.abc import Iterator

from nemotron_recipes.config.compose import Composed
from nemotron_recipes.errors import Problem
from nemotron_recipes.spec import Placement, Tree

_ON_MORE = {
    "data_prep": "leave it out; data.workers says on how many cores",
    "convert": "leave it out, or share the model out: parallel.expert_model_parallel_size=N, ... (docs/backends.md)",
}


def placement_of(config: Tree, profile: str | None) -> Placement:
    """From `run`; its options are the executor's own."""
    options = dict(config["run"])
    executor, nodes = options.pop("executor"), options.pop("nodes")
    nproc, names = options.pop("nproc_per_node"), tuple(options.pop("secrets", ()))
    if _is_one_process(config):  # whatever the training stages of the same profile use
        nodes = nproc = 1
    return Placement(executor, profile, nodes, nproc, options, names)


def not_heard(config: Tree, composed: Composed) -> Iterator[Problem]:
    """Processes that the command line asks for, of a stage that is one."""
    for key in ("nodes", "nproc_per_node") if _is_one_process(config) else ():
        origin, number = composed.origin(f"run.{key}"), config["run"][key]
        if number != 1 and origin is not None and origin.kind == "command line":
            what = f"this stage is one process: run.{key}={number} would change nothing"
            yield Problem(what, str(origin), _ON_MORE[config["kind"]])


def _is_one_process(config: Tree) -> bool:
    return config["kind"] != "train" and config.get("parallel") is None
