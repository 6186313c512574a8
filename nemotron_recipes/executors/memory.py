"""Memory that CPU and GPU share: whether a plan fits, and how much is left. Standard library only.

On a DGX Spark, too large an allocation hangs the host instead of raising an error. NVML does not know the memory there,
a cgroup (docker --memory) does not see what CUDA takes, and cudaMemGetInfo leaves out what the page cache could give
back; /proc/meminfo is the one source that tells how much is left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nemotron_recipes.errors import Problem
from nemotron_recipes.executors.verdict import what_is_kept
from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import Artifact, StagePlan

MEMINFO = Path("/proc/meminfo")
GIB = 1 << 30
STOPPED_BY = "MEMORY"  # in the event that ends the run

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FOUR_BITS = 0.5  # the least: layers that the loader leaves as they are come on top
_STORED_BYTES = 2  # per parameter: what checkpoints of the family are published in


class Memory(NamedTuple):
    """Of the machine, in bytes."""

    total: int
    available: int  # with what the page cache can give back
    free: int  # without it


def read_memory(file: Path = MEMINFO) -> Memory | None:
    """What is left now; None where the kernel doesn't say (it is no Linux)."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if rest.strip()}
    return Memory(*(kib[name] << 10 for name in ("MemTotal", "MemAvailable", "MemFree")))


def needed(stage: StagePlan, environ: Mapping[str, str] = os.environ) -> int | None:
    """Bytes that a training stage takes at least; None when that can't be told.

    Weights, and for all that is trained a gradient and Adam's two moments, in the type that is trained in. A second
    model counts where a method compares with one. Activations, adapters and buffers come on top.
    """
    if stage.kind != "train" or "model.path" not in stage.inputs:
        return None
    stored = _weights(stage.inputs["model.path"], environ)
    if not stored:
        return None
    config = stage.config
    each = _BYTES.get(config["model"].get("dtype", "bfloat16"), _STORED_BYTES)
    weights = int(stored // _STORED_BYTES * (_FOUR_BITS if config["model"].get("load_in_4bit") else each))
    if config.get("peft"):
        return weights  # the frozen base is the reference, too
    return weights * (5 if stage.method in ("dpo", "kto") else 4)


def misfit(stage: StagePlan, reserve_gib: float, where: str, memory: Memory | None) -> Problem | None:
    """Why the stage must not start: it takes more than is available less the reserve."""
    need = needed(stage)
    if need is None or memory is None or need <= memory.available - reserve_gib * GIB:
        return None
    what = (
        f"stage {stage.name} takes at least {need / GIB:.1f} GiB (weights, gradients, Adam's moments), but"
        f" {memory.available / GIB:.1f} GiB are available, of which {reserve_gib:g} GiB are kept in reserve"
    )
    if need > memory.total - reserve_gib * GIB:
        fix = f"this machine has {memory.total / GIB:.1f} GiB: train adapters (peft), or a smaller model"
    else:
        fix = "stop what else uses memory, and drop the page cache: sync; echo 3 | sudo tee /proc/sys/vm/drop_caches"
    return Problem(what, where, fix)


def shortage(stop_gib: float | None, memory: Memory | None) -> str:
    """Why a run must be stopped now; "" while enough is left."""
    if stop_gib is None or memory is None or memory.available >= stop_gib * GIB:
        return ""
    return f"{memory.available / GIB:.1f} GiB of memory were available, and memory_stop_gib is {stop_gib:g}"


def ended_for(short: str, stage: StageDir) -> str:
    """The cause of a run's end, with what to do."""
    advice = f"lower micro_batch_size or the pack size; {what_is_kept(stage)}"
    return f"stopped before the machine ran out of memory: {short}; {advice}"


def _weights(artifact: Artifact, environ: Mapping[str, str]) -> int:
    """Bytes of the model's weights on this machine; 0 when they are not here."""
    if artifact.source in ("store", "path"):
        folder = Path(artifact.uri)
    elif artifact.source == "hub" and artifact.revision:
        home = environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
        cache = Path(environ.get("HF_HUB_CACHE") or Path(home, "hub"))
        folder = cache / f"models--{artifact.name.replace('/', '--')}" / "snapshots" / artifact.revision
    else:
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if "checkpoints" not in path.parts)
