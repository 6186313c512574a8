"""What the nodes of a cluster can do, seen from a job on them: GPUs, Python, torch, the shared folder, one another.

Sent as it is and started by itself, one process per GPU (one per node without), so it knows only the standard library,
and torch where there is one. Rank K writes facts-K.json, and once all have, reduce-K.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

BYTES = 64 << 20  # written to the shared folder and read back
NUMBERS = 4 << 20  # float32 values that are summed over all ranks
ROUNDS = 3
MEET_SECONDS = 120.0  # a network file system may show a new file a minute late
COLLECTIVE_SECONDS = 120.0
GPU_SECONDS = 60.0  # nvidia-smi of a GPU that has fallen off the bus may hang


def main(folder: Path) -> None:
    """Write both files of this rank."""
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    facts: dict[str, Any] = {"node": os.environ["SLURMD_NODENAME"], "rank": rank, **_torch()}
    if os.environ["SLURM_LOCALID"] == "0":
        facts |= {"python": platform.python_version(), **_gpus(), **_folder(folder, rank)}
    _write(folder / f"facts-{rank}.json", facts)
    everybody = {number: _wait(folder / f"facts-{number}.json", MEET_SECONDS) for number in range(world)}
    _write(folder / f"reduce-{rank}.json", {"node": facts["node"], "rank": rank, **_reduce(folder, rank, everybody)})


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA that it needs is not there
        return {"torch": "", "torch_error": str(error), "cuda": False}
    return {"torch": torch.__version__, "torch_error": "", "cuda": torch.cuda.is_available()}


def _gpus() -> dict[str, Any]:
    """Those that nvidia-smi sees; none where there is no such command."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=GPU_SECONDS, check=False)
    except FileNotFoundError:
        return {"gpus": 0, "gpu_error": ""}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"gpus": 0, "gpu_error": str(error)}
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    return {"gpus": count, "gpu_error": (done.stderr or done.stdout).strip()[:500] if done.returncode else ""}


def _folder(folder: Path, rank: int) -> dict[str, Any]:
    """Bytes per second to and from the folder; by how many seconds, at least, its server is ahead of this node."""
    file, piece = folder / f"bytes-{rank}", os.urandom(1 << 20)
    try:
        began = time.perf_counter()
        with open(file, "xb") as handle:
            for _ in range(BYTES // len(piece)):
                handle.write(piece)
            handle.flush()
            os.fsync(handle.fileno())
            written = time.perf_counter() - began
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else this node's own memory is read
        stamp = folder / f"clock-{rank}"
        before = time.time()
        with open(stamp, "xb") as handle:
            handle.write(b"x")
            handle.flush()
            os.fsync(handle.fileno())
            after, stamped = time.time(), os.fstat(handle.fileno()).st_mtime
        ahead = stamped - min(max(stamped, before), after)  # a slow disk is no wrong clock
        began = time.perf_counter()
        with open(file, "rb", buffering=0) as read:
            while read.read(1 << 20):
                pass
        took = time.perf_counter() - began
        file.unlink()
    except OSError as error:
        return {"folder_error": str(error.strerror)}
    return {"folder_error": "", "write": BYTES / written, "read": BYTES / took, "ahead": ahead}


def _reduce(folder: Path, rank: int, everybody: dict[int, Any]) -> dict[str, Any]:
    """Sum over all ranks, and check the sum: {backend, seconds of one} or {skipped: why} or {error: why}."""
    missing = [number for number, facts in everybody.items() if facts is None]
    if missing:
        return {"error": f"rank {', '.join(map(str, missing))} did not come within {MEET_SECONDS:.0f} s"}
    if not all(facts["torch"] for facts in everybody.values()):
        return {"skipped": "not every node can import torch"}
    backend = "nccl" if all(facts["cuda"] for facts in everybody.values()) else "gloo"
    try:
        return {"backend": backend, "seconds": _summed(folder, rank, len(everybody), backend)}
    except (RuntimeError, ValueError, OSError) as error:
        return {"error": f"{backend}: {error}"}


def _summed(folder: Path, rank: int, world: int, backend: str) -> float:
    import torch
    from torch import distributed

    limit = timedelta(seconds=COLLECTIVE_SECONDS)
    if rank == 0:
        host = os.environ["NEMOTRON_PROBE_HOST"]
        store = distributed.TCPStore(host, 0, world, True, limit, wait_for_workers=False)
        _write(folder / "meeting.json", {"host": host, "port": store.port})
    else:
        told = _wait(folder / "meeting.json", MEET_SECONDS)
        if told is None:
            raise RuntimeError(f"rank 0 opened no meeting within {MEET_SECONDS:.0f} s")
        store = distributed.TCPStore(told["host"], told["port"], world, False, limit)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["SLURM_LOCALID"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    numbers = torch.full((NUMBERS,), float(rank + 1), device=device)
    distributed.all_reduce(numbers)  # the first connects all
    wanted = world * (world + 1) / 2
    if not bool((numbers == wanted).all()):
        raise ValueError(f"the sum over all ranks is not {wanted:g} everywhere")
    _settled(device)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        distributed.all_reduce(numbers)
    _settled(device)
    took = (time.perf_counter() - began) / ROUNDS
    distributed.barrier()  # rank 0 holds the store: nobody leaves early
    distributed.destroy_process_group()
    return took


def _settled(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write(path: Path, tree: dict[str, Any]) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(tree))
    os.replace(new, path)


def _wait(path: Path, seconds: float) -> Any:
    """What the file says once it is there; None if it does not come."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            time.sleep(0.05)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
