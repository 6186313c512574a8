"""Parameters by kind of layer. Pure arithmetic, checked against the real model classes on the meta device.

Per layer, with h the hidden size, biases only where the model has them:

    attention   h (q + 2 k) + q h            q = heads * head_dim, k = kv_heads * head_dim
    Mamba-2     h (2 d + 2 g n + m) + d h + (d + 2 g n)(kernel + 1) + d + 3 m
                                             d = heads * head_dim, m heads, g groups, n state (arXiv 2405.21060)
    MLP         2 h f, gated 3 h f
    MoE         experts * 2 w f + 2 h f_shared + experts * h + 2 h w if w != h
                                             w: the latent width, else h (gated: 3 for 2)
    each        + h for its norm
"""

from __future__ import annotations

from dataclasses import dataclass

from nemotron_recipes.sizing.shape import Shape


@dataclass(frozen=True)
class LayerSize:
    """Parameters of one layer, by how they are shared out.

    split       by tensor parallelism
    whole       on every rank of it: norms, routers, latent projections
    routed      of all routed experts, by expert (tensor) parallelism
    """

    split: int = 0
    whole: int = 0
    routed: int = 0

    @property
    def total(self) -> int:
        return self.split + self.whole + self.routed


def layer(shape: Shape, letter: str) -> LayerSize:
    """The size of one layer of the kind `letter`."""
    h, norm = shape.hidden, shape.hidden
    if letter == "*":
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        biases = q + 2 * kv if shape.attention_bias else 0
        norms = 2 * shape.head_dim if shape.qk_norm else 0
        return LayerSize(h * (q + 2 * kv) + q * h + biases, norm + norms)
    if letter == "M":
        inner, states = shape.mamba_heads * shape.mamba_head_dim, shape.mamba_groups * shape.mamba_state
        into, convolved = 2 * inner + 2 * states + shape.mamba_heads, inner + 2 * states
        small = convolved * (shape.conv_kernel + 1) + inner + 3 * shape.mamba_heads
        return LayerSize(h * into + inner * h + small, norm)
    matrices = 3 if shape.gated else 2
    if letter == "-":
        return LayerSize(matrices * h * shape.ffn, norm)
    width = shape.latent or h
    projections = 2 * h * width if shape.latent else 0
    return LayerSize(
        split=matrices * h * shape.shared_ffn,
        whole=norm + shape.experts * h + projections,
        routed=shape.experts * matrices * width * shape.expert_ffn,
    )


def embedding(shape: Shape) -> int:
    """One embedding matrix."""
    return shape.vocab * shape.hidden


def routers(shape: Shape) -> int:
    """The routers of all layers: published totals of this family leave them out."""
    return shape.count("E") * shape.experts * shape.hidden


def total(shape: Shape) -> int:
    """All parameters but those of multi-token prediction."""
    matrices = 1 if shape.tied else 2
    return sum(layer(shape, letter).total for letter in shape.pattern) + matrices * embedding(shape) + shape.hidden


def active(shape: Shape) -> int:
    """Parameters that one token passes, embeddings included."""
    idle = shape.count("E") * layer(shape, "E").routed if shape.experts else 0
    return total(shape) - idle + (idle * shape.top_k // shape.experts if shape.experts else 0)


def prediction(shape: Shape) -> int:
    """Of one block of multi-token prediction: its layers, and what joins it to the model."""
    if not shape.mtp_pattern:
        return 0
    return sum(layer(shape, letter).total for letter in shape.mtp_pattern) + joint(shape)


def joint(shape: Shape) -> int:
    """What joins a block of multi-token prediction to the model: a projection of two states, and three norms."""
    return 2 * shape.hidden**2 + 3 * shape.hidden
