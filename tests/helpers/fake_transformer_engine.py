"""A fake of Transformer Engine for machines without CUDA: its layers with their real parameters, and no kernels.

Enough to build, load, convert and save a model of Megatron-Core on a CPU; not to run one. Imported where
Megatron-Bridge is installed; of this project only tools/schemas/stubs.py is needed.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2] / "tools" / "schemas"))
import stubs

STUBS = ("modelopt", "nvidia_resiliency_ext", "megatron.core.inference.contexts.attention_context.triton")


class _Layer(torch.nn.Module):
    def add(self, named: dict[str, tuple[int, ...]], dtype: torch.dtype | None) -> None:
        for name, shape in named.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype or torch.float32)))

    def set_tensor_parallel_group(self, group: Any) -> None:
        """One process has none."""


class Linear(_Layer):
    def __init__(self, in_features: int, out_features: int, bias: bool = True, params_dtype: Any = None, **unused: Any):
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.te_return_bias, self.bias = False, None
        self.add({"weight": (out_features, in_features)}, params_dtype)
        if bias:
            del self.bias
            self.add({"bias": (out_features,)}, params_dtype)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, normalization: str = "LayerNorm", **named: Any):
        super().__init__(in_features, out_features, **named)
        self.add({"layer_norm_weight": (in_features,)}, named.get("params_dtype"))
        if normalization != "RMSNorm":
            self.add({"layer_norm_bias": (in_features,)}, named.get("params_dtype"))


class RMSNorm(_Layer):
    def __init__(self, hidden_size: int, params_dtype: Any = None, **unused: Any):
        super().__init__()
        self.add({"weight": (hidden_size,)}, params_dtype)


class DotProductAttention(_Layer):
    def __init__(self, *given: Any, **named: Any):
        super().__init__()


def install() -> None:
    """From now on Megatron-Core finds these layers, and a CUDA that has nothing to wait for."""
    stubs.install(("transformer_engine", "megatron.energon", *STUBS))
    fake: Any = importlib.import_module("transformer_engine.pytorch")
    cpu_offload: Any = importlib.import_module("transformer_engine.pytorch.cpu_offload")

    sys.modules["transformer_engine"].pytorch = fake  # type: ignore[attr-defined]
    for layer in (Linear, LayerNormLinear, RMSNorm, DotProductAttention):
        setattr(fake, layer.__name__, layer)
    cpu_offload.get_cpu_offload_context = fake.get_cpu_offload_context = lambda *given, **named: (
        contextlib.nullcontext(),
        lambda tensor: tensor,
    )
    torch.cuda.synchronize = lambda *given: None
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.get_rng_state = torch.get_rng_state  # save_megatron_model asks for it and then leaves it out
