"""What Megatron's own readers see: run where megatron-bridge is installed, on a CPU with a fake Transformer Engine.

megatron_readers.py npy FILE          JSON: for each pack [input_ids, loss_mask, seq_boundaries]
megatron_readers.py parquet FILE      the same; versions that read parquet
megatron_readers.py indexed PREFIX    JSON: for each document its ids
megatron_readers.py blend FOLDER      JSON: what a pretraining's config makes of a prepared folder
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import fake_transformer_engine  # noqa: E402

fake_transformer_engine.install()
PACKED = ("megatron.bridge.data.packing.gpt_sft", "megatron.bridge.data.datasets.sft")
PARQUET = ("megatron.bridge.data.packing.parquet", "megatron.bridge.data.datasets.packed_parquet")


def reader(modules: tuple[str, ...], name: str) -> Any:
    """The class, wherever this version has it."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
    sys.exit(f"this version has no {name}")


def packs(kind: Any, path: str) -> list[list[list[int]]]:
    tokenizer = SimpleNamespace(eos_id=0, bos_id=0, pad_id=0)
    found = kind(path, tokenizer, max_seq_length=4096, memmap_workers=1, prompt_template="{text} {answer}")
    rows = [found[number] for number in range(len(found))]
    return [[list(map(int, row[key])) for key in ("input_ids", "loss_mask", "seq_boundaries")] for row in rows]


def main(what: str, path: str) -> Any:
    if what == "npy":
        return packs(reader(PACKED, "GPTSFTPackedDataset"), path)
    if what == "parquet":
        return packs(reader(PARQUET, "GPTSFTPackedParquetDataset"), path)
    if what == "indexed":
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        documents = IndexedDataset(path)
        assert documents.document_indices.tolist() == list(range(len(documents) + 1))
        return [documents[number].tolist() for number in range(len(documents))]
    from nemotron_recipes.worker.megatron_bridge.config import _use_pretraining_data

    config = SimpleNamespace(dataset=SimpleNamespace())
    _use_pretraining_data(config, Path(path), 4096)
    return config.dataset.blend_per_split


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
