"""What each backend keeps of a parameter, and how it shares that out. Pure; read from a validated config.

Where a backend's own setting decides, its native key is read; what is not set there is what the named recipe or the
library takes (sources beside each). A backend that is not here gets no estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemotron_recipes.backends.nemo_rl_native import setting
from nemotron_recipes.spec import Tree

_BYTES = {"float32": 4, "bfloat16": 2}
_TORCH_BYTES = {"float32": 4, "fp32": 4, "float16": 2, "fp16": 2, "bfloat16": 2, "bf16": 2, "uint8": 1, "fp8": 1}
# NF4 with double quantisation: 4 bits, a constant of 8 bits for 64 weights, one of 32 bits for 256 of those
# (QLoRA, arXiv 2305.14314, section 3).
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True)
class Footprint:
    """Bytes per parameter, and what is shared out over data-parallel ranks beside tensor, pipeline and experts.

    gradient, optimizer   of what is trained; adapters are trained in 32 bits where `adapter_weight` is 4
    logit                 of each logit that is kept until the backward pass; 0: the loss never holds them all
    deferred              of a gradient that is shared out after the last micro batch alone: before, all of it is kept
    gathered              of a weight of a layer that FSDP has put together for its computation
    copies                whole models in memory: 2 where a frozen one is kept to compare with
    quantized             linear layers but routed experts in 4 bits
    """

    weight: float
    gradient: float
    optimizer: float
    adapter_weight: float = 2
    shards_weights: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    recompute: bool = False
    logit: float = 6
    deferred: float = 0
    gathered: float = 2
    copies: int = 1
    quantized: bool = False


def footprint(config: Tree, processes: int) -> Footprint | None:
    """The footprint of a training stage; None: this backend, or this method on it, is not estimated."""
    read = _OF_BACKEND.get(config["backend"]["name"])
    return read(config, processes) if read else None


def _megatron(config: Tree, processes: int) -> Footprint:
    """Weights in the type of training, 32-bit gradients, a 32-bit copy and two moments: 18 bytes of BF16, of which the
    distributed optimizer shares out 12 (training/utils/theoretical_memory_utils.py of Megatron-Bridge 0.3.1). Its
    recipes for Nemotron 3 set use_distributed_optimizer, and no recomputation."""
    native = config["backend"]["native"]
    weight = _BYTES[config["model"]["dtype"]]
    optimizer, ddp, precision = (native.get(name, {}) for name in ("optimizer", "ddp", "mixed_precision"))
    moments = sum(_type_bytes(optimizer, f"{name}_dtype") for name in ("exp_avg", "exp_avg_sq"))
    copy = _type_bytes(optimizer, "main_params_dtype") if weight == 2 else 0
    offloaded = optimizer.get("optimizer_offload_fraction", 1.0)
    kept = (moments + copy) * (1 - (offloaded if isinstance(offloaded, (int, float)) else 1.0))  # the schema refuses it
    return Footprint(
        weight=weight,
        gradient=4 if precision.get("grad_reduce_in_fp32", True) else weight,
        optimizer=kept if optimizer.get("optimizer_cpu_offload") else moments + copy,
        adapter_weight=weight,
        shards_optimizer=ddp.get("use_distributed_optimizer", True),
        recompute=native.get("model", {}).get("recompute_granularity") == "full",
        logit=4 if native.get("model", {}).get("cross_entropy_loss_fusion") else 6,  # BF16, and 32 bits for the loss
    )


def _automodel(config: Tree, processes: int) -> Footprint:
    """FSDP2 shares out everything; torch's AdamW keeps its moments in the type of the weights (AutoModel v0.5.0).

    With several micro batches a step, gradients are summed up whole, in FSDP's type of reduction, unless
    distributed.defer_fsdp_grad_sync is false (its default is true: get_sync_ctx in components/distributed/utils.py; 32
    bits: FSDP2Config.mp_policy; to_accumulated_grad_if_needed in PyTorch's _fsdp_param.py).
    """
    native = config["backend"]["native"]
    distributed = native.get("distributed", {})
    weight = _BYTES[config["model"]["dtype"]]
    loss = str(native.get("loss_fn", {}).get("_target_", ""))
    return Footprint(
        weight=weight,
        gradient=weight,
        optimizer=2 * weight,
        adapter_weight=weight,
        shards_weights=True,
        shards_gradients=True,
        shards_optimizer=True,
        recompute=bool(distributed.get("activation_checkpointing")),
        logit=0 if loss.endswith("FusedLinearCrossEntropy") else 6,
        deferred=4 if distributed.get("defer_fsdp_grad_sync", True) else 0,
    )


def _nemo_rl(config: Tree, processes: int) -> Footprint | None:
    """The policy while it is trained; what stays beside it is sizing/policy.py's. NeMo-RL v0.7.0.

    DPO on DTensor: weights are loaded in 32 bits whatever `precision` is, so are gradients and both moments, FSDP2
    shares out all of it and computes in 16 (nemo_rl/models/automodel/setup.py, lines 330 and 484). Logits come in 16
    bits, are kept in 32, and so is their log softmax. GRPO on Megatron: 16-bit weights and gradients, a 32-bit copy and
    two moments that the distributed optimizer shares out (examples/configs/grpo_math_1B.yaml).
    """
    if config["method"] == "dpo":
        recompute = setting(config, "policy.dtensor_cfg.activation_checkpointing")
        return Footprint(4, 4, 8, 4, True, True, True, recompute=bool(recompute), logit=10)
    if not setting(config, "policy.generation.colocated.enabled"):
        return None  # how many GPUs are left to the policy is said elsewhere
    section = "policy.megatron_cfg."
    return Footprint(
        weight=2,
        gradient=4 if setting(config, f"{section}distributed_data_parallel_config.grad_reduce_in_fp32") else 2,
        optimizer=12,
        shards_optimizer=bool(setting(config, f"{section}optimizer.use_distributed_optimizer")),
        recompute=bool(setting(config, f"{section}activation_checkpointing")),
    )


def _trl(config: Tree, processes: int) -> Footprint | None:
    """Every process holds all of it: weights, gradients and two moments in the type that is trained in; PEFT trains
    adapters in 32 bits, and DDP keeps its buckets beside the gradients. TRL's configs checkpoint activations."""
    method = config["method"]
    if method == "grpo":
        return None  # what generation keeps depends on its length and batch
    if any(config["backend"]["native"].get(name) for name in ("fsdp", "deepspeed")):
        return None  # what is shared out stands in a file or a wrapping policy of theirs
    weight = _BYTES[config["model"]["dtype"]]
    trained = 4 if config["peft"] else weight
    return Footprint(
        weight=weight,
        gradient=trained * (2 if processes > 1 else 1),
        optimizer=2 * trained,
        adapter_weight=4,
        recompute=bool(config["backend"]["native"].get("gradient_checkpointing", True)),
        copies=2 if method in ("dpo", "kto") and not config["peft"] else 1,
        quantized=config["model"]["load_in_4bit"],
    )


_OF_BACKEND: dict[str, Callable[[Tree, int], Footprint | None]] = {
    "megatron_bridge": _megatron,
    "automodel": _automodel,
    "nemo_rl": _nemo_rl,
    "trl": _trl,
    "unsloth": _trl,  # the same trainers
}


def _type_bytes(section: Tree, name: str) -> float:
    """Bytes of a torch type that a native section names; 32 bits where it names none."""
    given: Any = section.get(name, "float32") if section.get("use_precision_aware_optimizer") else "float32"
    return _TORCH_BYTES.get(str(given).removeprefix("torch."), 4)
