"""Rules that a layout of processes must keep, whatever library carries it out. Pure.

Terms as in Megatron: world = DP * TP * PP * CP for the dense layers, and EDP * EP * ETP * PP for the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemotron_recipes.errors import Problem
from nemotron_recipes.spec import Tree

VIRTUAL = "virtual_pipeline_model_parallel_size"  # Megatron-Bridge's, in its section `model`


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups over `world` processes, one GPU each. virtual: stages a rank of the pipeline has."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False
    virtual: int = 1

    @classmethod
    def of(cls, config: Tree, world: int) -> Layout:
        """From a validated config; without its section `parallel` the batches alone are shared out."""
        told, virtual = config["parallel"], 1
        if config["backend"]["name"] == "megatron_bridge":
            given = config["backend"]["native"].get("model", {}).get(VIRTUAL)
            virtual = given if type(given) is int else 1  # the schema refuses what is no number
        if told is None:
            return cls(world, virtual=virtual)
        return cls(
            world,
            tensor=told["tensor_model_parallel_size"],
            pipeline=told["pipeline_model_parallel_size"],
            context=told["context_parallel_size"],
            expert=told["expert_model_parallel_size"],
            expert_tensor=told["expert_tensor_parallel_size"],
            sequence_parallel=told["sequence_parallel"],
            virtual=virtual,
        )

    @property
    def settings(self) -> Tree:
        """The section `parallel` that means it."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "context_parallel_size": self.context,
            "expert_model_parallel_size": self.expert,
            "expert_tensor_parallel_size": self.expert_tensor,
            "sequence_parallel": self.sequence_parallel,
        }

    @property
    def replica(self) -> int:
        """Processes that hold one copy of the dense layers."""
        return self.tensor * self.pipeline * self.context

    @property
    def smallest(self) -> int:
        """The fewest processes on which it works."""
        return self.pipeline * max(self.tensor * self.context, self.expert * self.expert_tensor)

    @property
    def data(self) -> int:
        """Data-parallel replicas; 0 where they can't be formed."""
        return self.world // self.replica if self.world % self.replica == 0 else 0


def layout_problems(layout: Layout) -> Iterator[Problem]:
    """Whether the groups fit the processes: each broken rule, with the values that keep it."""
    world = layout.world
    if world % layout.replica:
        what = (
            f"{world} process(es) can't be split into replicas of {layout.replica}"
            f" (tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context})"
        )
        yield Problem(
            what, "parallel", f"a number of GPUs that {layout.replica} divides: {_next(world, layout.replica)}"
        )
    experts = layout.expert * layout.expert_tensor * layout.pipeline
    if world % experts:
        what = (
            f"{world} process(es) can't be split into groups of {experts} for the experts"
            f" (expert {layout.expert} x expert tensor {layout.expert_tensor} x pipeline {layout.pipeline})"
        )
        fits = [n for n in range(1, world + 1) if world % (n * layout.expert_tensor * layout.pipeline) == 0]
        fix = f"parallel.expert_model_parallel_size={_list(fits)}" if fits else f"{_next(world, experts)} GPUs"
        yield Problem(what, "parallel", fix)
    if layout.sequence_parallel and layout.tensor == 1:
        what = "sequence parallelism shares out what tensor parallelism leaves whole, but that is 1"
        yield Problem(what, "parallel", "parallel.sequence_parallel=false, or a larger tensor_model_parallel_size")
    if layout.virtual < 1 or (layout.virtual > 1 and layout.pipeline == 1):
        what = f"a rank can't have {layout.virtual} of {layout.pipeline} pipeline stage(s)"
        yield Problem(what, f"backend.native.model.{VIRTUAL}", "leave it out, or a larger pipeline_model_parallel_size")


def batch_problems(layout: Layout, config: Tree, packs: bool = False) -> Iterator[Problem]:
    """Whether batches and sequences can be shared out. packs: rows are data prep's, several sequences each."""
    train = config["train"]
    whole, micro = train["global_batch_size"], train["micro_batch_size"]
    step = micro * (layout.data or 1)
    if layout.data and whole % step:
        yield Problem(
            f"train.global_batch_size {whole} is no multiple of"
            f" micro batch {micro} x {layout.data} data-parallel replicas",
            fix=f"train.global_batch_size={_near(whole, step)}",
        )
    elif not layout.data and whole % layout.world:
        yield Problem(
            f"train.global_batch_size {whole} can't be shared out over {layout.world} process(es)",
            fix=f"train.global_batch_size={_near(whole, layout.world * micro)}",
        )
    if packs and micro != 1:
        yield Problem("packed sequences need micro batches of one pack", fix="train.micro_batch_size=1")
    if packs and layout.context > 1:
        what = "context parallelism needs each sequence of a pack padded for it, which data prep does not do"
        yield Problem(what, fix="parallel.context_parallel_size=1")
    size = config["data"]["pack_size"]
    parts = 2 * layout.context if layout.context > 1 else 1
    if layout.sequence_parallel:
        parts = max(parts, layout.context * layout.tensor)
    if size and size % parts:
        what = f"data.pack_size {size} can't be shared out: context and sequence parallelism need a multiple of {parts}"
        yield Problem(what, fix=f"data.pack_size={_near(size, parts)}, in data prep too")


def _next(at_least: int, step: int) -> str:
    first = -(-at_least // step) * step
    return f"{first}, {first + step}, ..."


def _near(value: int, step: int) -> str:
    below = value // step * step
    return f"{below + step}" if not below else f"{below} or {below + step}"


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}" if len(values) > 1 else str(values[0])
