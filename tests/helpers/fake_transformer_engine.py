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
from torch.overrides import TorchFunctionMode

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
    """With tensor parallelism a rank holds its part of the outputs, or of the inputs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: Any = None,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        **unused: Any,
    ):
        super().__init__()
        out_features //= tp_size if parallel_mode == "column" else 1
        in_features //= tp_size if parallel_mode == "row" else 1
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


class GroupedLinear(_Layer):
    """The linear layers of a rank's experts: weight0, weight1, ..."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, params_dtype: Any = None, **named: Any):
        super().__init__()
        self.num_gemms, self.in_features, self.out_features, self.use_bias = num_gemms, in_features, out_features, False
        self.te_return_bias = self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        self.add({f"weight{number}": (out_features, in_features) for number in range(num_gemms)}, params_dtype)

    def init_fp8_metadata(self, **unused: Any) -> None:
        """There is no FP8 here."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nor a state of it."""


class GatedRMSNorm(_Layer):
    """mamba_ssm's, before the output projection of a Mamba layer."""

    def __init__(self, hidden_size: int, dtype: Any = None, **unused: Any):
        super().__init__()
        self.add({"weight": (hidden_size,)}, dtype)


class RMSNorm(_Layer):
    def __init__(self, hidden_size: int, params_dtype: Any = None, **unused: Any):
        super().__init__()
        self.add({"weight": (hidden_size,)}, params_dtype)


class DotProductAttention(_Layer):
    def __init__(self, *given: Any, **named: Any):
        super().__init__()


class _OnCpu(TorchFunctionMode):
    """What asks for memory of a GPU gets the machine's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if "device" in named and "cuda" in str(named["device"]):
            named["device"] = "cpu"
        return func(*args, **named)


def install() -> None:
    """From now on Megatron-Core finds these layers, and a CUDA that has nothing to wait for."""
    stubs.install(("transformer_engine", "megatron.energon", "mamba_ssm", *STUBS))
    gated: Any = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
    gated.RMSNorm = GatedRMSNorm
    fake: Any = importlib.import_module("transformer_engine.pytorch")
    cpu_offload: Any = importlib.import_module("transformer_engine.pytorch.cpu_offload")

    sys.modules["transformer_engine"].pytorch = fake  # type: ignore[attr-defined]
    for layer in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention):
        setattr(fake, layer.__name__, layer)
    cpu_offload.get_cpu_offload_context = fake.get_cpu_offload_context = lambda *given, **named: (
        contextlib.nullcontext(),
        lambda tensor: tensor,
    )
    _OnCpu().__enter__()
    torch.cuda.synchronize = lambda *given: None
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.Stream = contextlib.nullcontext  # type: ignore[assignment,misc]
    torch.cuda.get_rng_state = torch.get_rng_state  # save_megatron_model asks for it and then leaves it out
    scatter = torch.distributed.scatter

    def whole(tensor: Any, parts: Any = None, **named: Any) -> Any:
        """Views of one tensor become whole on their way to a GPU; Gloo takes them for whole as they are."""
        return scatter(tensor, parts and [part.contiguous() for part in parts], **named)

    torch.distributed.scatter = whole
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *given, **named: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *given, **named: torch.set_rng_state(state)
    loading: Any = importlib.import_module("megatron.bridge.training.model_load_save")
    begin = loading.temporary_distributed_context

    @contextlib.contextmanager
    def seeded(**named: Any) -> Any:
        """As where a GPU is visible: without one the state that Mamba layers are built with is left out."""
        with begin(**named):
            random.model_parallel_cuda_manual_seed(0)
            yield

    loading.temporary_distributed_context = seeded
