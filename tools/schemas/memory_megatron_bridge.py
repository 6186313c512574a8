"""Runs inside the environment of one megatron-bridge version: asks its own estimator how much memory training takes.

    python memory_megatron_bridge.py STUB,STUB,... < [{"model": {...}, "micro_batch_size", "data_parallel_size", ...}]

Prints [{"weights_and_optimizer", "activations"}] in bytes. The estimator reads attributes alone, so that a namespace
with the names of its ConfigContainer does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import stubs

FIELDS = {
    "share_embeddings_and_output_weights": False,
    "virtual_pipeline_model_parallel_size": None,
    "num_moe_experts": None,
    "should_pad_vocab": False,
}


def answer(case: dict[str, Any]) -> dict[str, float]:
    import torch.nn.functional as functions
    from megatron.bridge.training.utils import theoretical_memory_utils as estimator

    activation = functions.silu if case["model"]["gated_linear_unit"] else functions.gelu
    config: Any = SimpleNamespace(
        model=SimpleNamespace(**FIELDS, **case["model"], activation_func=activation),
        optimizer=SimpleNamespace(use_distributed_optimizer=case["use_distributed_optimizer"]),
        train=SimpleNamespace(micro_batch_size=case["micro_batch_size"]),
        data_parallel_size=case["data_parallel_size"],
    )
    return {
        "weights_and_optimizer": estimator.compute_weight_and_optimizer_memory(config),
        "activations": estimator.compute_activation_memory(config, case["num_microbatches"]),
    }


def main() -> None:
    stubs.install(sys.argv[1].split(","))
    json.dump([answer(case) for case in json.load(sys.stdin)], sys.stdout, indent=1)


if __name__ == "__main__":
    main()
