"""A training stage's validated config in the words of this package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nemotron_recipes.backends.layout import Layout
from nemotron_recipes.backends.nemo_rl_native import setting
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.sizing.footprint import Footprint, footprint
from nemotron_recipes.sizing.lora import Lora
from nemotron_recipes.sizing.memory import Batch, Memory, memory, trained_parameters
from nemotron_recipes.sizing.shape import Shape
from nemotron_recipes.spec import Artifact, Tree

_TRANSFORMERS = ("trl", "unsloth")  # backends that load Transformers' own model classes


@dataclass(frozen=True)
class Sized:
    """What is known of a stage's size. sequence 0: how long sequences are is not known before the data."""

    shape: Shape
    footprint: Footprint
    lora: Lora | None
    sequence: int
    micro: int
    global_batch: int

    def memory(self, layout: Layout) -> Memory:
        """Bytes on the fullest GPU of a layout."""
        number = max(1, self.global_batch // (self.micro * max(1, layout.data)))
        return memory(self.shape, layout, Batch(self.sequence, self.micro, number), self.footprint, self.lora)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: what is trained, and the optimizer's state of it."""
        each = self.footprint.adapter_weight if self.lora else self.footprint.weight
        return round(trained_parameters(self.shape, self.lora) * (each + self.footprint.optimizer))


def sized(config: Tree, shape: Shape, processes: int, data: Artifact | None) -> Sized | None:
    """None where the backend's use of memory is not estimated."""
    print_ = footprint(config, processes)
    if print_ is None:
        return None
    train = config["train"]
    pairs = 2 if (config["backend"]["name"], config["method"]) == ("nemo_rl", "dpo") else 1  # it counts pairs
    # Transformers leaves multi-token prediction out, and so does NeMo-RL (mtp_num_layers 0 in its examples).
    predicts = config["backend"]["name"] not in (*_TRANSFORMERS, "nemo_rl")
    return Sized(
        shape if predicts else replace(shape, mtp_pattern=""),
        print_,
        _lora(config),
        sequence_of(config, data),
        train["micro_batch_size"] * pairs,
        train["global_batch_size"] * pairs,
    )


def sequence_of(config: Tree, data: Artifact | None) -> int:
    """Tokens of one sequence that goes through at once: of a pack, where rows are packed, or at most; else 0."""
    if config["backend"]["name"] == "nemo_rl":
        return _tokens(setting(config, "policy.max_total_sequence_length"))
    packed: Any = config["backend"]["native"].get("packed_sequence", {})
    told = config["data"]["pack_size"] or packed.get("packed_sequence_size")
    if told or data is None or data.source not in ("store", "path") or config["method"] != "sft":
        return _tokens(told)
    metadata = transport.call(there.document, f"{data.uri}/metadata.json")
    return int(metadata.get("pack_size") or 0) if metadata else 0


def _tokens(value: Any) -> int:
    """A number that a backend's own key gives: 0 where it is none, which the check of the backend says."""
    return value if type(value) is int and value > 0 else 0


def _lora(config: Tree) -> Lora | None:
    peft = config["peft"]
    if peft is None:
        return None
    # PEFT reaches the fused weights of routed experts by `target_parameters` alone.
    experts = tuple(peft["target_parameters"]) if config["backend"]["name"] in _TRANSFORMERS else None
    excluded = config["backend"]["native"].get("peft", {}).get("exclude_modules", ())
    return Lora(peft["dim"], tuple(peft["target_modules"]), experts, tuple(excluded))
