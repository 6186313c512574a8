"""A base in 4 bits: which of its weights are, and whether it can fit.

bitsandbytes quantises `nn.Linear` layers. Weights of routed experts are 3-D parameters of one module: they may stay as
they are, and of a mixture of experts they are nearly all. On a DGX Spark too large a load hangs the machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from nemotron_recipes.errors import JobFailed, Problem, UserError

SKIPPED = ["lm_head", "out_proj"]  # Mamba's kernels read out_proj's weight directly
_NF4 = 0.5159  # bytes a weight: 4 bits, and 0.127 bits of doubly quantised scales (arXiv 2305.14314, section 3)
GIB = 1 << 30


class Split(NamedTuple):
    """Bytes of a model's weights."""

    quantised: int
    other: int


def bitsandbytes_config() -> Any:
    """NF4 with double quantisation, computed in bfloat16: QLoRA's settings."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=SKIPPED,
    )


def expected(model: Any) -> Split:
    """Of a model that is not in 4 bits yet (on the device "meta", say), as bitsandbytes' rule has it."""
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] not in SKIPPED
    }
    sizes = [(id(p) in linear, p.numel(), p.element_size()) for p in model.parameters()]
    return Split(
        int(sum(count * _NF4 for quantised, count, _ in sizes if quantised)),
        sum(count * size for quantised, count, size in sizes if not quantised),
    )


def require_room(split: Split, device: int | None = None) -> None:
    """UserError: the weights alone are more than the GPU has (`device` bytes); without a GPU all goes."""
    device = _device_bytes() if device is None else device
    if device is not None and sum(split) > device:
        what = (
            f"in 4 bits this model takes at least {sum(split) / GIB:.1f} GiB, of which {split.other / GIB:.1f} GiB stay"
            f" in 16 bits (routed experts, mostly); this device has {device / GIB:.1f} GiB"
        )
        fix = "use a base whose experts are quantised already, or a larger device"
        raise UserError(Problem(what, "model.load_in_4bit", fix))


def found(model: Any) -> Split:
    """Of a model that was loaded in 4 bits. JobFailed: nothing of it is."""
    weights = list(model.parameters())
    quantised = sum(p.numel() * p.element_size() for p in weights if type(p).__name__ == "Params4bit")
    if not quantised:
        raise JobFailed("the model was to be loaded in 4 bits, and no weight of it is: is bitsandbytes there?")
    return Split(quantised, sum(p.numel() * p.element_size() for p in weights) - quantised)


def _device_bytes() -> int | None:
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
