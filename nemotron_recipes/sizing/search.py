"""Layouts that a stage could have: which keep every rule, what each takes of a GPU, and which is best. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemotron_recipes.backends import Backend
from nemotron_recipes.backends.layout import Layout, layout_problems
from nemotron_recipes.errors import Problem
from nemotron_recipes.sizing.memory import Memory, Verdict
from nemotron_recipes.sizing.rules import model_problems, tensor_sizes
from nemotron_recipes.sizing.stage import Sized
from nemotron_recipes.spec import Tree

_ORDER: dict[Verdict, int] = {"fits": 0, "tight": 1, "doubtful": 2, "impossible": 3}
_NODE = 8  # GPUs of the usual node
_MOST = 64


@dataclass(frozen=True)
class Candidate:
    """A layout that keeps every rule, and what it takes of the fullest GPU. verdict None: of how large a one?"""

    layout: Layout
    memory: Memory
    verdict: Verdict | None
    chosen: bool = True  # False: this backend has this one alone, and no settings for it

    @property
    def overrides(self) -> tuple[str, ...]:
        """What to add to a command for it."""
        if not self.chosen:
            return ()
        return tuple(f"parallel.{key}={str(value).lower()}" for key, value in self.layout.settings.items())


def search(
    config: Tree, backend: Backend, size: Sized, nodes: int, per_node: int, capacity: float | None
) -> tuple[list[Candidate], list[Problem]]:
    """(layouts on nodes x per_node GPUs, best first; what is wrong with the config whatever the layout).

    Ranked: what fits with its margin, then what is tight; then what is split least, in the order of what a split costs:
    pipeline, context, tensor, expert tensor, experts beyond a node, experts; then the most memory left. Where nobody
    says how large a GPU is: what takes least.
    """
    world = nodes * per_node
    beside = _problems(_batch_for(config, world), backend, Layout(world))
    found = []
    choice = _has_layouts(config, backend)
    for layout in _layouts(config, size, world, per_node) if choice else (Layout(world),):
        if set(_problems(config, backend, layout)) <= set(beside):
            takes = size.memory(layout)
            verdict = takes.verdict(capacity) if capacity else None
            found.append(Candidate(layout, takes, verdict, chosen=choice))
    if not found:
        beside = _problems(config, backend, Layout(world))
    return sorted(found, key=lambda one: _rank(one, per_node)), beside


def smallest(
    config: Tree, backend: Backend, size: Sized, nodes: int, per_node: int, capacity: float
) -> tuple[int, int, Candidate] | None:
    """(nodes, GPUs of each, layout) of the fewest on which it fits; None: on none of those that are tried.

    Of one node up to `_NODE` GPUs are tried, then `_MOST` times as many nodes; each time twice as many.
    """
    places = [(nodes, per_node)]
    while nodes == 1 and per_node * 2 <= _NODE:
        per_node *= 2
        places.append((nodes, per_node))
    places += [(nodes << power, per_node) for power in range(1, _MOST.bit_length())]
    for nodes, per_node in places:
        found, _ = search(config, backend, size, nodes, per_node, capacity)
        if found and found[0].verdict in ("fits", "tight"):
            return nodes, per_node, found[0]
        if not _has_layouts(config, backend) and not size.footprint.shards_weights:
            break  # every process holds all of it, however many there are
    return None


def _layouts(config: Tree, size: Sized, world: int, per_node: int) -> Iterator[Layout]:
    shape = size.shape
    megatron = config["backend"]["name"] == "megatron_bridge"
    powers = [1 << power for power in range(world.bit_length())]
    experts = (
        [n for n in range(1, shape.experts + 1) if shape.experts % n == 0 and n <= world] if shape.experts else [1]
    )
    for tensor in (n for n in tensor_sizes(shape) if n <= per_node):
        for pipeline in (n for n in range(1, shape.layers + 1) if shape.layers % n == 0 and n <= world):
            for context in powers:
                if world % (tensor * pipeline * context):
                    continue
                for expert in experts:
                    for expert_tensor in {1, tensor} if megatron and shape.experts else {1}:
                        layout = Layout(
                            world, tensor, pipeline, context, expert, expert_tensor, megatron and tensor > 1
                        )
                        if not [*layout_problems(layout), *model_problems(shape, layout, config["backend"]["name"])]:
                            yield layout


def _problems(config: Tree, backend: Backend, layout: Layout) -> list[Problem]:
    changed = {**config, "parallel": layout.settings} if _has_layouts(config, backend) else config
    return backend.check(changed, layout.world)


def _has_layouts(config: Tree, backend: Backend) -> bool:
    """Whether this backend takes any layout but that all processes do the same."""
    return any(key.startswith("parallel.") for key in backend.table(config["method"]))


def _batch_for(config: Tree, world: int) -> Tree:
    """The config with a batch that can be shared out over any layout: what is wrong then is no layout's fault."""
    train = config["train"]
    return {**config, "train": {**train, "global_batch_size": world * train["micro_batch_size"]}}


def _rank(one: Candidate, per_node: int) -> tuple[float, ...]:
    layout = one.layout
    splits = (layout.pipeline, layout.context, layout.tensor, layout.expert_tensor)
    split_least = (*splits, layout.expert > per_node, layout.expert, one.memory.needed)
    return (_ORDER[one.verdict], *split_least) if one.verdict else (one.memory.needed, *split_least)
