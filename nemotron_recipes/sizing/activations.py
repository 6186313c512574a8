"""What the forward pass keeps for the backward one, in bytes per token of one micro batch. Pure.

The count of Korthikanti et al. (arXiv 2205.05198, section 4.1) by kind of layer, without the dropout masks that these
models don't have, and with flash attention, which keeps no matrix of scores. 16-bit values; a norm, a linear layer and
an activation function keep their inputs:

    attention   norm h, projections h, q + 2 k of the kernel and its output q
    Mamba-2     norm h, in_proj h, its output 2 d + 2 g n + m, the scan's d, out_proj d (the fused kernel of mamba_ssm
                does the convolution again in the backward pass)
    MLP         norm h, up projection h, activation f, down projection f; gated 4 f instead of 2 f
    MoE         norm h, router 2 E in 32 bits, per chosen expert w + 2 f, the shared expert as an MLP without norm
"""

from __future__ import annotations

from nemotron_recipes.sizing.shape import Shape

_HALF = 2  # bytes of a 16-bit value


def layer_bytes(shape: Shape, letter: str) -> tuple[float, float]:
    """(all that is kept, of that: what tensor parallelism shares out; sequence parallelism shares out all of it)."""
    h = shape.hidden
    if letter == "*":
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        split = 2 * q + 2 * kv
        return _HALF * (2 * h + split), _HALF * split
    if letter == "M":
        inner, states = shape.mamba_heads * shape.mamba_head_dim, shape.mamba_groups * shape.mamba_state
        split = 4 * inner + 2 * states + shape.mamba_heads
        return _HALF * (2 * h + split), _HALF * split
    if letter == "-":
        split = _mlp(shape, shape.ffn)
        return _HALF * (2 * h + split), _HALF * split
    width = shape.latent or h
    routed = shape.top_k * (width + _mlp(shape, shape.expert_ffn))
    shared = _mlp(shape, shape.shared_ffn)
    latent = 2 * width if shape.latent else 0
    return _HALF * (2 * h + routed + shared + latent) + 8 * shape.experts, _HALF * shared


def dispatched(shape: Shape) -> float:
    """Bytes per token that expert parallelism sends and receives at once in one layer: in and out, both ways."""
    return _HALF * 4 * shape.top_k * (shape.latent or shape.hidden)


def kept(shape: Shape, pattern: str, recompute: bool, tensor: int, sequence_parallel: bool) -> float:
    """Bytes per token of the layers `pattern` on one rank. With recomputation: each layer's input, and the largest one
    whole while it is done again (Megatron's uniform method, one layer at a time)."""
    each = [_on_rank(shape, letter, tensor, sequence_parallel) for letter in pattern]
    if not recompute:
        return sum(each)
    inputs = _HALF * shape.hidden / (tensor if sequence_parallel else 1)
    return inputs * len(pattern) + max(each, default=0.0)


def _on_rank(shape: Shape, letter: str, tensor: int, sequence_parallel: bool) -> float:
    everything, split = layer_bytes(shape, letter)
    if sequence_parallel:
        return everything / tensor
    return everything - split + split / tensor


def _mlp(shape: Shape, width: int) -> int:
    return (4 if shape.gated else 2) * width
