"""What a rank ran on: host, hardware, Python, packages, and the part of the environment that shapes a run.

Nothing here may stop a run: what can't be learned is left out.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from nemotron_recipes.redact import reads_like_a_secret, scrub, secret_values

# Variables whose values say how a run computes or where it stands. Of all others nothing is kept, not even the name.
SHAPING = (
    *("CUDA_", "NCCL_", "NVIDIA_", "NVTE_", "OMP_", "MKL_", "TORCH", "PYTORCH_", "PYTHON", "LD_LIBRARY_PATH"),
    *(
        "SLURM_JOB_ID",
        "SLURM_JOB_NODELIST",
        "SLURM_NNODES",
        "SLURM_NTASKS",
        "SLURM_RESTART_COUNT",
        "SLURM_CLUSTER_NAME",
    ),
    *("NEMOTRON_", "HF_HOME", "HF_HUB_", "TOKENIZERS_", "WORLD_SIZE", "MASTER_ADDR", "WANDB_MODE", "TZ", "LANG"),
)
PER_START = ("TORCHELASTIC_",)  # ports, ids and files of one start
GPU_QUERY = "name,memory.total,driver_version,uuid"


def collect(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Plain data for `environment/attempt-N.json`. Values of secrets are in none of it, only the names."""
    hidden = secret_values(environ)
    shaping = {n: value for n, value in environ.items() if n.startswith(SHAPING) and not n.startswith(PER_START)}
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "gpus": _gpus(),
        "container": _container(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": _packages(),
        "variables": {
            name: scrub(value, hidden) for name, value in sorted(shaping.items()) if not reads_like_a_secret(name)
        },
        "secrets": sorted(name for name in environ if reads_like_a_secret(name)),
    }


def _packages() -> dict[str, str]:
    """Name -> version. The library's own properties read whole descriptions as e-mails, which takes a CPU second."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        head = dict(line.partition(": ")[::2] for line in text.partition("\n\n")[0].splitlines())
        if "Name" in head and "Version" in head:
            found.setdefault(head["Name"], head["Version"])
    return dict(sorted(found.items()))


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _gpus() -> list[dict[str, str]]:
    """Name, memory, driver and UUID of each GPU, as nvidia-smi says; none where there is no nvidia-smi."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = subprocess.run(
            [command, f"--query-gpu={GPU_QUERY}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    names = GPU_QUERY.split(",")
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def _container() -> str:
    """The kind of container that this is, as far as it shows; "" on bare metal."""
    for mark, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if Path(mark).exists():
            return kind
    return "enroot" if "ENROOT_ROOTFS" in os.environ else ""
