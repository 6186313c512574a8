"""What the executor contract suite needs to know of each executor. A row per row of `executors.REGISTRY`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_recipes.executors import Executor
from nemotron_recipes.rundir import RunDir, read_jsonl
from nemotron_recipes.spec import JobHandle, Placement
from tests.helpers import docker


@dataclass(frozen=True)
class Harness:
    """How one executor is tested.

    profile      fields of a profile that works where the tests run
    fixture      of pytest, to be had before anything is submitted; its `env` is set for the test
    surrounding  names of variables that what carries out the run adds or changes by itself, besides NEMOTRON_ATTEMPT
    inherits     whether a stage gets this process's environment
    """

    profile: dict[str, Any]
    fixture: str = ""
    surrounding: Callable[[str], bool] = lambda name: False
    inherits: bool = True


def _around_slurm_jobs(name: str) -> bool:
    """Slurm's own, those of the shell that runs the batch script, NeMo-Run's, and the executor's."""
    shell = ("ENVIRONMENT", "HOSTNAME", "PS1", "PWD", "OLDPWD", "SHLVL", "_", "TMPDIR", "GPU_DEVICE_ORDINAL")
    ours = ("TORCHX_MAX_RETRIES", "NEMOTRON_HOSTS", "NEMOTRON_JOB_END", "NEMOTRON_DEADLINE")
    gpus = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    return name.startswith(("SLURM", "SBATCH_", "SRUN_", "PMI")) or name in (*shell, *ours, *gpus)


def _of_the_image(name: str) -> bool:
    return name in ("PATH", "HOSTNAME", "PYTHONPATH", "LC_ALL")


HARNESSES = {
    "docker": Harness(docker.profile(grace_seconds=1.0), "docker_daemon", _of_the_image, inherits=False),
    "local": Harness({"executor": "local", "grace_seconds": 1.0}),
    "slurm": Harness({"executor": "slurm", "account": "lab", "time": "5"}, "slurm_cluster", _around_slurm_jobs),
}


def placement(executor: Executor, **fields: Any) -> Placement:
    """A placement made as planning makes it: the profile's fields, validated by the executor's own model."""
    options = executor.profile_model(**{**HARNESSES[executor.name].profile, **fields}).model_dump()
    return Placement(
        executor.name, "test", options["nodes"], options["nproc_per_node"], options, tuple(options["secrets"])
    )


def wait_until_over(executor: Executor, handle: JobHandle, seconds: float = 120) -> str:
    """The liveness that follows "queued" and "running"."""
    deadline = time.monotonic() + seconds
    while (state := executor.liveness(handle)) in ("queued", "running"):
        assert time.monotonic() < deadline, f"still {state} after {seconds} s: {events(handle)}"
        time.sleep(0.05)
    return state


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.05)
    return value


def events(handle: JobHandle, *names: str) -> list[dict[str, Any]]:
    """The run's events, without their times; only those called `names`, if any are given."""
    found = [dict(e) for e in read_jsonl(RunDir(Path(handle.run_dir)).events)]
    for entry in found:
        del entry["time"]
    return [e for e in found if not names or e["event"] in names]
