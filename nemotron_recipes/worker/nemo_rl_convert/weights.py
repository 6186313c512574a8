"""Sharded weights -> safetensors files of a Hugging Face folder, a file at a time, in the type that is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import JobFailed

FILE_BYTES = 5 * 10**9  # of one file of weights, and about what is in memory twice
INDEX = "model.safetensors.index.json"


def write_weights(shards: Path, model: Path, output: Path, dtype: str, strict: bool) -> None:
    """Weights of a folder of PyTorch's distributed checkpoints, or of safetensors files, as one model in `output`.

    Everything becomes `dtype` but what `model`, the folder that training began from, keeps in a type of its own (a
    router's corrections in 32 bits). JobFailed: `model` has weights that the shards lack, unless not `strict`.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    def reader() -> Any:
        if (shards / ".metadata").is_file():
            return dcp.FileSystemReader(str(shards))
        return dcp.HuggingFaceStorageReader(str(shards))

    metadata = reader().read_metadata()
    paths = metadata.planner_data or {}
    found = {key: entry for key, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}
    places = {_name(paths.get(key, (key,))): (key, paths.get(key, (key,))) for key in found}
    known, own = _types_of(model)
    if strict and not known:
        raise JobFailed(f"{model} holds no safetensors to compare with; backend.native.strict=false goes without")
    if missing := sorted(known.keys() - places.keys()):
        what = f"{len(missing)} weight(s) of {model} are not in the checkpoint: {', '.join(missing[:5])}"
        if strict:
            raise JobFailed(f"{what}; backend.native.strict=false exports what is there")
        print(f"warning: {what}", flush=True)
    types = {name: own.get(name, getattr(torch, dtype)) for name in places}
    sizes = {name: found[key].size.numel() * types[name].itemsize for name, (key, _) in places.items()}
    files = _files(sizes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        state: dict[str, Any] = {}
        tensors = {}
        for name in names:
            key, path = places[name]
            tensors[name] = torch.empty(found[key].size, dtype=found[key].properties.dtype)
            _put(state, path, tensors[name])
        dcp.load(state, storage_reader=reader(), no_dist=True)
        typed = {
            name: tensor.to(types[name]) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        }
        save_file(typed, output / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def state_type(config: Path, dtype: str) -> None:
    """Let a config.json say which type the weights have now, under the names that it has for it."""
    tree = json.loads(config.read_text(encoding="utf-8"))
    names = [name for name in ("dtype", "torch_dtype") if name in tree] or ["dtype"]
    config.write_text(json.dumps({**tree, **dict.fromkeys(names, dtype)}, indent=2) + "\n", encoding="utf-8")


def _types_of(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(type of each weight of a Hugging Face folder, those of them that are not in the type of the most)."""
    from safetensors import safe_open

    types: dict[str, str] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as weights:
            types |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    numbers = {name: _TORCH[kind] for name, kind in types.items() if kind in _TORCH}
    import torch

    usual = max(set(numbers.values()), key=list(numbers.values()).count, default="")
    return types, {name: getattr(torch, kind) for name, kind in numbers.items() if kind != usual}


_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _name(path: Iterable[Any]) -> str:
    """A weight's own name: DTensor v1 of NeMo-RL keeps all weights below `model`."""
    first, *rest = path
    return ".".join(map(str, rest)) if first == "model" and rest else ".".join(map(str, (first, *rest)))


def _put(state: dict[str, Any], path: tuple[Any, ...], tensor: Any) -> None:
    *above, last = path
    for part in above:
        state = state.setdefault(part, {})
    state[last] = tensor


def _files(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, so many in a file as go into FILE_BYTES."""
    files: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not files:
            files.append([])
            room = FILE_BYTES
        files[-1].append(name)
        room -= size
    return files
