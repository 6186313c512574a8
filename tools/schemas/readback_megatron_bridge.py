"""Runs inside the environment of one megatron-bridge version: applies megatron.yaml to the real ConfigContainer as the
worker does, and prints which values are in it then.

    python readback_megatron_bridge.py STUB,STUB,... < {"recipe", "method", "pack_size", "native", "data"}
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import stubs  # noqa: E402
from collect_megatron_bridge import plain_value  # noqa: E402


def read(config: Any, tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value in the real object, for every key of `tree`."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        actual = getattr(config, name)
        if isinstance(value, dict) and dataclasses.is_dataclass(actual):
            found |= read(actual, value, f"{prefix}{name}.")
        else:
            found[prefix + name] = plain_value(actual)
    return found


def main() -> None:
    stubs.install(sys.argv[1].split(","))
    told = json.load(sys.stdin)
    from nemotron_recipes.worker.megatron_bridge.config import Paths, build_config

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        for name in ("training.npy", "validation.npy"):
            (data / name).touch()
        paths = Paths(data, "ORG/NAME", pretrained=Path("/base"), load=Path("/run"), load_step=7)
        config = build_config(told["recipe"], told["method"], told["pack_size"], told["native"], paths)
        values = read(config, told["native"])
        specs = config.dataset.packed_sequence_specs
        values |= {
            "tokenizer.tokenizer_model": config.tokenizer.tokenizer_model,
            **{
                f"checkpoint.{n}": getattr(config.checkpoint, n) for n in ("pretrained_checkpoint", "load", "ckpt_step")
            },
            "dataset": type(config.dataset).__name__,
            "dataset.seq_length": config.dataset.seq_length,
            "dataset.packed_sequence_specs.packed_sequence_size": specs.packed_sequence_size,
            "dataset.packed_sequence_specs.pad_seq_to_mult": specs.pad_seq_to_mult,
            "dataset.packed_sequence_specs.packed_train_data_path": Path(str(specs.packed_train_data_path)).name,
        }
    json.dump(values, sys.stdout, indent=1, sort_keys=True)


if __name__ == "__main__":
    main()
