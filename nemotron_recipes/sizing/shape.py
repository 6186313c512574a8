"""The shape of a model: what its parameters and its activations follow from.

Layers are letters, as in Megatron-Core's hybrid patterns: M Mamba-2, * attention, - dense MLP, E mixture of experts.
Each is one norm and one mixer. A block of a usual transformer is therefore `*-` or `*E`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of one model. 0: it has none of that.

    unverified   names of fields whose figure nobody has checked against a published config or code
    sources      field or "*" -> where the figure is from
    """

    name: str
    pattern: str
    hidden: int
    vocab: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 0  # width of the dense MLP
    gated: bool = False  # MLPs and experts have a gate beside their up projection
    tied: bool = False  # one matrix is both input and output embedding
    attention_bias: bool = False  # on q, k and v
    qk_norm: bool = False
    mamba_heads: int = 0
    mamba_head_dim: int = 0
    mamba_state: int = 0
    mamba_groups: int = 0
    conv_kernel: int = 4
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0  # width of the expert that every token passes
    latent: int = 0  # width that routed experts work in, where it is not `hidden`
    block: int = 1  # letters of what a pipeline takes for one layer: 2 of a usual transformer
    mtp_pattern: str = ""  # layers of one block of multi-token prediction, which several depths may share
    unverified: frozenset[str] = frozenset()
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        """Whether every figure has been checked: only then may a plan be refused for it."""
        return not self.unverified

    @property
    def layers(self) -> int:
        """Layers that pipeline stages share out."""
        return len(self.pattern) // self.block

    def count(self, letter: str) -> int:
        """Layers of a kind."""
        return self.pattern.count(letter)


def from_hf_config(config: Mapping[str, Any], name: str) -> Shape | None:
    """The shape that a Hugging Face config.json states; None for an architecture that is not known here."""
    known = _READERS.get(str(config.get("model_type")))
    try:
        shape = known(config, name) if known else None
        return shape if shape and _counts(shape) else None
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # a config that leaves its own fields out, or has something else in them


def _counts(shape: Shape) -> bool:
    """Whether its figures are such that one can count with them."""
    figures = [getattr(shape, each.name) for each in fields(shape) if each.type == "int"]
    whole = all(isinstance(figure, int) and figure >= 0 for figure in figures)
    return whole and min(shape.hidden, shape.vocab, shape.heads, shape.kv_heads, shape.head_dim) > 0


def _dense(config: Mapping[str, Any], name: str) -> Shape:
    heads = config["num_attention_heads"]
    return Shape(
        name=name,
        pattern="*-" * config["num_hidden_layers"],
        block=2,
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn=config["intermediate_size"],
        gated=True,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", config["model_type"] == "qwen2")),
        qk_norm=str(config["model_type"]).startswith("qwen3"),
        sources={"*": "config.json"},
    )


def _experts(config: Mapping[str, Any], name: str) -> Shape:
    dense = _dense({"intermediate_size": 0, **config}, name)
    return replace(
        dense,
        pattern="*E" * config["num_hidden_layers"],
        experts=config.get("num_experts") or config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        expert_ffn=config.get("moe_intermediate_size") or config["intermediate_size"],
        ffn=0,
    )


def _nemotron_h(config: Mapping[str, Any], name: str) -> Shape:
    pattern = config.get("hybrid_override_pattern")
    if pattern is None:
        pattern = "".join(LETTERS[kind] for kind in config["layers_block_type"])
    predicts = config.get("num_nextn_predict_layers", 0)
    block = config.get("mtp_layers_block_type") or []
    mtp = config.get("mtp_hybrid_override_pattern") or "".join(LETTERS[kind] for kind in block)
    return Shape(
        name=name,
        pattern=pattern,
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        ffn=config["intermediate_size"] if "-" in pattern else 0,
        tied=bool(config.get("tie_word_embeddings", False)),
        mamba_heads=config["mamba_num_heads"],
        mamba_head_dim=config["mamba_head_dim"],
        mamba_state=config["ssm_state_size"],
        mamba_groups=config["n_groups"],
        conv_kernel=config.get("conv_kernel", 4),
        experts=config["n_routed_experts"] if "E" in pattern else 0,
        top_k=config["num_experts_per_tok"] if "E" in pattern else 0,
        expert_ffn=config["moe_intermediate_size"] if "E" in pattern else 0,
        shared_ffn=config["moe_shared_expert_intermediate_size"] if "E" in pattern else 0,
        latent=config.get("moe_latent_size") or 0,
        mtp_pattern=mtp if predicts else "",
        sources={"*": "config.json"},
    )


_READERS: dict[str, Callable[[Mapping[str, Any], str], Shape]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _dense),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _experts),
    "nemotron_h": _nemotron_h,
}
