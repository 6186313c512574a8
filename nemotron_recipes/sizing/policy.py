"""What NeMo-RL keeps beside the policy that it trains. Pure; read from a validated config. NeMo-RL v0.7.0.

The reference model lies in the host's memory, pinned, and changes places with the policy for its log probabilities
(setup_reference_model_state in nemo_rl/models/automodel/setup.py and nemo_rl/models/megatron/setup.py). While vLLM
generates on the same GPUs, the policy, its gradients and its optimizer wait in the host's memory; while the policy is
trained, vLLM sleeps (level 1, nemo_rl/models/generation/vllm/vllm_worker.py). So a GPU never holds both.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemotron_recipes.backends.nemo_rl_native import setting
from nemotron_recipes.backends.nemo_rl_rules import VLLM_TENSOR, vllm_of
from nemotron_recipes.errors import Problem
from nemotron_recipes.sizing import parameters
from nemotron_recipes.sizing.memory import GIB, Memory
from nemotron_recipes.sizing.shape import Shape
from nemotron_recipes.spec import Tree


def notes(config: Tree, shape: Shape, takes: Memory, per_node: int) -> Iterator[str]:
    """For people: what the figures assume, what vLLM takes, and what waits in the memory of a node."""
    if config["backend"]["name"] != "nemo_rl":
        return
    longest = setting(config, "policy.max_total_sequence_length")
    if longest:
        yield f"sequences counted as long as they may be: {longest} tokens (policy.max_total_sequence_length)"
    host = takes.weights if _compares(config) else 0.0
    if vllm := vllm_of(config):
        share, weight = vllm
        weights = weight * parameters.total(shape)
        yield f"while vLLM generates: {share:.0%} of each GPU, {weights / GIB:.1f} GiB of it weights"
    if config["method"] == "grpo":
        host += takes.weights + takes.gradients + takes.optimizer
    if host:
        yield f"in the memory of a node beside that: {host * per_node / GIB:.0f} GiB (reference model, waiting policy)"


def problems(config: Tree, shape: Shape, capacity: float | None) -> Iterator[Problem]:
    """Whether vLLM's share of a GPU has room for its weights at all."""
    if config["backend"]["name"] != "nemo_rl" or not capacity or not (vllm := vllm_of(config)):
        return
    share, weight = vllm
    weights = weight * parameters.total(shape)
    if shape.verified and weights > share * capacity:
        what = f"vLLM's weights take {weights / GIB:.1f} GiB of each GPU, of which it gets {share * capacity / GIB:.1f}"
        least = -(-weights * setting(config, VLLM_TENSOR) // (share * capacity))
        fix = f"backend.native.{VLLM_TENSOR}={_power(int(least))}"
        yield Problem(what, f"backend.native.{VLLM_TENSOR}", fix)


def _compares(config: Tree) -> bool:
    """DPO always has a reference; GRPO loads one unless its penalty is 0 (nemo_rl/algorithms/grpo.py)."""
    return config["method"] == "dpo" or bool(config["grpo"]["kl_beta"])


def _power(least: int) -> int:
    return 1 << (least - 1).bit_length()
