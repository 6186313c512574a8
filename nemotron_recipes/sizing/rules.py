"""Whether a layout fits a model: each broken rule with the values that keep it. Pure.

What has to do with the number of processes and with batches is backends/layout.py's; this is about heads, groups,
layers and experts. The rules are Megatron-Core's own assertions (0.16.1): transformer/attention.py, ssm/mamba_mixer.py,
transformer/moe; AutoModel shares out the same things, and has one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemotron_recipes.backends.layout import VIRTUAL, Layout
from nemotron_recipes.errors import Problem
from nemotron_recipes.sizing.shape import Shape


def model_problems(shape: Shape, layout: Layout, backend: str) -> Iterator[Problem]:
    """Every rule of the model, and of the model on this backend, that the layout breaks."""
    if backend == "automodel" and shape.experts and layout.tensor > 1:
        # components/moe/parallelizer.py of AutoModel v0.5.0 asserts it.
        what = "AutoModel has no tensor parallelism for models with experts"
        yield Problem(what, "parallel", "parallel.tensor_model_parallel_size=1")
    yield from _tensor_problems(shape, layout.tensor)
    layers = shape.layers
    if layers % layout.pipeline:
        what = f"{layers} layers of {shape.name} can't be shared out over {layout.pipeline} pipeline stages evenly"
        yield _problem(what, "pipeline_model_parallel_size", [n for n in _divisors(layers) if n <= layout.world])
    yield from _virtual_problems(shape, layout)
    if not shape.experts:
        if layout.expert * layout.expert_tensor > 1:
            what = f"{shape.name} has no experts to share out"
            fix = "parallel.expert_model_parallel_size=1 parallel.expert_tensor_parallel_size=1"
            yield Problem(what, "parallel", fix)
        return
    if shape.experts % layout.expert:
        what = f"{shape.experts} experts of {shape.name} can't be shared out over {layout.expert} ranks"
        yield _problem(what, "expert_model_parallel_size", [n for n in _divisors(shape.experts) if n <= layout.world])
    if shape.expert_ffn % layout.expert_tensor:
        what = f"experts of width {shape.expert_ffn} can't be split by {layout.expert_tensor}"
        fits = [n for n in _divisors(shape.expert_ffn) if n <= layout.world]
        yield _problem(what, "expert_tensor_parallel_size", fits)


def tensor_sizes(shape: Shape) -> list[int]:
    """The tensor parallel sizes that every layer of the model can be split by."""
    largest = max(shape.heads, shape.mamba_heads, 1)
    return [size for size in _divisors(largest) if not list(_broken(shape, size))]


def _tensor_problems(shape: Shape, tensor: int) -> Iterator[Problem]:
    for what in _broken(shape, tensor):
        yield _problem(
            f"{what} of {shape.name} can't be split by {tensor}", "tensor_model_parallel_size", tensor_sizes(shape)
        )


def _virtual_problems(shape: Shape, layout: Layout) -> Iterator[Problem]:
    """Several stages a rank of the pipeline: ssm/mamba_block.py has none, transformer_config.py wants them even."""
    each, left = divmod(shape.layers, layout.pipeline)
    if layout.virtual <= 1 or left:
        return
    where = f"backend.native.model.{VIRTUAL}"
    if shape.mamba_heads:
        yield Problem(
            f"Megatron-Core has no virtual pipeline stages for Mamba layers, as {shape.name} has", where, "leave it out"
        )
    elif each % layout.virtual:
        what = f"{each} layers of a rank can't be shared out over {layout.virtual} virtual stages evenly"
        yield Problem(what, where, f"{where}={_any_of(_divisors(each))}")


def _broken(shape: Shape, tensor: int) -> Iterator[str]:
    """What can't be split. Fewer key-value heads than ranks are kept on several of them."""
    if shape.heads and shape.heads % tensor:
        yield f"{shape.heads} attention heads"
    kv = shape.kv_heads
    if kv and kv % tensor and tensor % kv:
        yield f"{kv} key-value heads"
    if shape.mamba_heads and shape.mamba_heads % tensor:
        yield f"{shape.mamba_heads} Mamba heads"
    if shape.mamba_groups and shape.mamba_groups % tensor:
        yield f"{shape.mamba_groups} Mamba groups"
    for width, name in ((shape.ffn, "an MLP"), (shape.shared_ffn, "shared experts")):
        if width and width % tensor:
            yield f"{name} of width {width}"


def _problem(what: str, key: str, fits: list[int]) -> Problem:
    return Problem(what, "parallel", f"parallel.{key}={_any_of(fits)}")


def _any_of(fits: list[int]) -> str:
    return ", ".join(map(str, fits[:-1])) + f" or {fits[-1]}" if len(fits) > 1 else str(fits[0])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
