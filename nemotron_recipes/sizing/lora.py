"""How large adapters are (LoRA, arXiv 2106.09685): rank * (inputs + outputs) of each adapted matrix. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

from nemotron_recipes.sizing.shape import Shape


@dataclass(frozen=True)
class Lora:
    """Adapters. Names are Hugging Face's or Megatron's, with `*`.

    modules    none: every linear layer, as AutoModel reads it
    experts    names of the routed experts' matrices; None: `modules` names them as well
    excluded   names that are left out whatever `modules` says
    """

    rank: int
    modules: tuple[str, ...]
    experts: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()


def adapter_sizes(shape: Shape, letter: str, lora: Lora) -> tuple[int, int]:
    """Parameters of the adapters in one layer: (of dense matrices, of all routed experts)."""
    dense = routed = 0
    for names, inputs, outputs, count in _matrices(shape, letter):
        targets = lora.experts if count > 1 and lora.experts is not None else lora.modules or ("*",)
        left_out = any(_meant(name, names) for name in lora.excluded)
        if left_out or not any(_meant(target, names) for target in targets):
            continue
        size = lora.rank * (inputs + outputs) * count
        if count > 1:
            routed += size
        else:
            dense += size
    return dense, routed


def _matrices(shape: Shape, letter: str) -> Iterator[tuple[tuple[str, str], int, int, int]]:
    """((Hugging Face's name, Megatron's), inputs, outputs, how many). Megatron's fused ones count as their parts."""
    h = shape.hidden
    if letter == "*":
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        for name, outputs in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            yield (name, "linear_qkv"), h, outputs, 1
        yield ("o_proj", "linear_proj"), q, h, 1
    elif letter == "M":
        inner, states = shape.mamba_heads * shape.mamba_head_dim, shape.mamba_groups * shape.mamba_state
        yield ("in_proj", "in_proj"), h, 2 * inner + 2 * states + shape.mamba_heads, 1
        yield ("out_proj", "out_proj"), inner, h, 1
    elif letter == "-":
        yield from _mlp(shape, h, shape.ffn, 1)
    else:
        if shape.shared_ffn:
            yield from _mlp(shape, h, shape.shared_ffn, 1)
        yield from _mlp(shape, shape.latent or h, shape.expert_ffn, shape.experts)


def _mlp(shape: Shape, width: int, ffn: int, count: int) -> Iterator[tuple[tuple[str, str], int, int, int]]:
    for name in ("up_proj", "gate_proj") if shape.gated else ("up_proj",):
        yield (name, "linear_fc1"), width, ffn, count
    yield ("down_proj", "linear_fc2"), ffn, width, count


def _meant(target: str, names: tuple[str, str]) -> bool:
    last = target.rpartition(".")[2]
    return any(last == name or fnmatch(name, last) for name in names)
