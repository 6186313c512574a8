"""Memory of the fullest GPU of a layout, in parts. Pure; docs/sizing.md has the formulas with their sources.

Per rank: dense layers by tensor and pipeline parallelism, routed experts by expert (tensor) parallelism, what is
replicated whole. What data-parallel ranks share out is divided by their number: DP * CP of the dense parameters,
world / (EP * ETP * PP) of the experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from nemotron_recipes.backends.layout import Layout
from nemotron_recipes.sizing import activations, parameters
from nemotron_recipes.sizing.footprint import NF4_BYTES, Footprint
from nemotron_recipes.sizing.lora import Lora, adapter_sizes
from nemotron_recipes.sizing.shape import Shape

GIB = 1 << 30
# fits: with the margin; tight: without it; doubtful: by a few per cent not; impossible: refused
Verdict = Literal["fits", "tight", "doubtful", "impossible"]
# What is in no formula: the CUDA context, NCCL's buffers, work space of kernels, what the allocator can't reuse,
# experts that get more than their share of the tokens.
MARGIN_FIXED = 2 * GIB
MARGIN_SHARE = 0.08  # of the sum
# Of activations, logits and buffers that is there for certain: published figures lie up to a fifth below the formulas.
CERTAIN_SHARE = 0.8


@dataclass(frozen=True)
class Batch:
    """What passes through at once: tokens of a sequence, sequences of a micro batch, micro batches of a step."""

    sequence: int
    micro: int
    number: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float  # of routed tokens on their way, and of layers that FSDP has gathered
    margin: float

    @property
    def needed(self) -> float:
        """Without the margin."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.margin

    @property
    def certain(self) -> float:
        """What it takes at least: a plan is refused for no more."""
        passing = self.activations + self.logits + self.buffers
        return self.needed - (1 - CERTAIN_SHARE) * passing

    def verdict(self, capacity: float) -> Verdict:
        """Whether it fits into `capacity` bytes."""
        if self.certain > capacity:
            return "impossible"
        if self.needed > capacity:
            return "doubtful"
        return "fits" if self.needed + self.margin <= capacity else "tight"


@dataclass(frozen=True)
class _Held:
    """Parameters on one rank, by the group that shares them out."""

    dense: float
    routed: float


def memory(shape: Shape, layout: Layout, batch: Batch, footprint: Footprint, lora: Lora | None) -> Memory:
    """Of the pipeline stage that takes most. lora: rank and target modules of adapters; None: all is trained.

    With the 1F1B schedule the first stage keeps as many micro batches as there are stages (arXiv 2104.04473).
    """
    stages = [_stage(shape, layout, batch, footprint, lora, number) for number in range(layout.pipeline)]
    return max(stages, key=lambda stage: stage.needed)


def _stage(shape: Shape, layout: Layout, batch: Batch, print_: Footprint, lora: Lora | None, number: int) -> Memory:
    pattern = _layers_of(shape, layout.pipeline, number)
    held = _held(shape, layout, pattern, number)
    linear = _held(shape, layout, pattern, number, embeddings=False).dense if print_.quantized else 0.0
    weights = _shared(held, layout, print_.weight, print_.shards_weights) * print_.copies
    weights -= linear * (print_.weight - NF4_BYTES) if print_.quantized else 0.0
    trained, extra = held, 0.0
    if lora is not None:
        trained = _adapters(shape, layout, pattern, lora)
        extra = _shared(trained, layout, print_.adapter_weight, print_.shards_weights)
    in_flight = min(layout.pipeline - number, batch.number)
    tokens = batch.sequence * batch.micro / layout.context
    each = activations.kept(shape, pattern, print_.recompute, layout.tensor, layout.sequence_parallel)
    last = number == layout.pipeline - 1
    logits = tokens * shape.vocab / layout.tensor * print_.logit if last else 0.0
    buffers = tokens * activations.dispatched(shape) if layout.expert > 1 and "E" in pattern else 0.0
    spread = layout.world > layout.tensor * layout.pipeline
    if print_.shards_weights and spread:
        buffers += 2 * print_.gathered * _largest(shape, layout, pattern)  # one is used while the next one comes
    gradients = _shared(trained, layout, print_.gradient, print_.shards_gradients)
    if spread and batch.number > 1:
        gradients = max(gradients, _shared(trained, layout, print_.deferred, False))
    parts = {
        "weights": weights + extra,
        "gradients": gradients,
        "optimizer": _shared(trained, layout, print_.optimizer, print_.shards_optimizer),
        "activations": tokens * each * in_flight,
        "logits": logits,
        "buffers": buffers,
    }
    return Memory(**parts, margin=MARGIN_FIXED + MARGIN_SHARE * sum(parts.values()))


def _layers_of(shape: Shape, pipeline: int, number: int) -> str:
    """The layers of one stage; blocks of multi-token prediction are the last one's."""
    each = -(-shape.layers // pipeline) * shape.block
    pattern = shape.pattern[number * each : (number + 1) * each]
    return pattern + (shape.mtp_pattern if number == pipeline - 1 else "")


def _held(shape: Shape, layout: Layout, pattern: str, number: int, embeddings: bool = True) -> _Held:
    sizes = [parameters.layer(shape, letter) for letter in pattern]
    dense = sum(size.split for size in sizes) / layout.tensor
    if embeddings:
        dense += sum(size.whole for size in sizes)
        first, last = number == 0, number == layout.pipeline - 1
        matrices = 1 if shape.tied and layout.pipeline == 1 else first + last
        dense += matrices * parameters.embedding(shape) / layout.tensor
        dense += shape.hidden if last else 0  # the norm before the output
        if last and shape.mtp_pattern:
            dense += parameters.joint(shape)
    return _Held(dense, sum(size.routed for size in sizes) / (layout.expert * layout.expert_tensor))


def trained_parameters(shape: Shape, lora: Lora | None) -> int:
    """Parameters that are trained, on all ranks together."""
    if lora is None:
        return parameters.total(shape) + parameters.prediction(shape)
    return sum(sum(adapter_sizes(shape, letter, lora)) for letter in shape.pattern + shape.mtp_pattern)


def _adapters(shape: Shape, layout: Layout, pattern: str, lora: Lora) -> _Held:
    dense = routed = 0.0
    for letter in pattern:
        own, of_experts = adapter_sizes(shape, letter, lora)
        dense += own / layout.tensor
        routed += of_experts / (layout.expert * layout.expert_tensor)
    return _Held(dense, routed)


def _shared(held: _Held, layout: Layout, each: float, shards: bool) -> float:
    """Bytes of what a rank holds, shared out over its data-parallel ranks where `shards`."""
    dense_ranks = layout.world // (layout.tensor * layout.pipeline) if shards else 1
    groups = layout.expert * layout.expert_tensor * layout.pipeline
    routed_ranks = max(1, layout.world // groups) if shards else 1
    return each * (held.dense / dense_ranks + held.routed / routed_ranks)


def _largest(shape: Shape, layout: Layout, pattern: str) -> float:
    """Parameters of the layer that takes most when FSDP has gathered it on a rank."""
    spread = layout.expert * layout.expert_tensor
    sizes = [parameters.layer(shape, letter) for letter in set(pattern)]
    gathered = [size.split / layout.tensor + size.whole + size.routed / spread for size in sizes]
    return max([*gathered, parameters.embedding(shape) / layout.tensor])
