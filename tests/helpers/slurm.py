"""Real Slurm clusters for tests: `slurm/testcluster` on this machine, driven by its command line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slurm import pyxis
from slurm.services import SEARCH, missing_packages
from slurm.spec import load

PROGRAM = Path(__file__).parents[2] / "slurm" / "testcluster"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up. Its methods fail the test when a command does."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment of commands that speak to this cluster, and of no other Slurm."""
        return outside() | {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    @property
    def release(self) -> tuple[int, ...]:
        """Which Slurm it is: (22, 5) of 22.05.8."""
        return load(self.folder).release.number

    def run(self, *argv: str, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands; `code` is the exit status that it must have (None: any)."""
        done = subprocess.run(argv, **{"env": self.env, "capture_output": True, "text": True, "timeout": 60, **options})
        assert code is None or done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def sbatch(self, script: str, *flags: str, cwd: Path) -> str:
        """Submit `script`, a shell command or more; the job's id. Its output is `cwd`/JOB.out."""
        text = f"#!/bin/bash\n{script}\n"
        return self.run("sbatch", "--parsable", "--output=%j.out", *flags, cwd=cwd, input=text).stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """The job once its state is one of `states`; without any, once it is over."""
        wanted = states or OVER
        return wait_for(
            lambda: job if (job := self.job(job_id))["JobState"] in wanted else None,
            f"job {job_id} to be {' or '.join(wanted)}",
            seconds,
        )

    def sacct_knows(self, *jobs: str, seconds: float = 120) -> None:
        """Once the accounting has heard of all of them: that takes seconds."""
        argv = ("sacct", "-X", "--noheader", "--parsable2", f"--jobs={','.join(jobs)}", "--format=JobID")
        wait_for(lambda: {*self.run(*argv).stdout.split()} >= {*jobs}, f"sacct to know {jobs}", seconds)

    def sacct(self, job_id: str, *fields: str, seconds: float = 120) -> list[str]:
        """The fields of the job itself (no step), once slurmctld has told slurmdbd of its end: that takes seconds."""
        argv = ("sacct", "-X", "--noheader", "--parsable2", "-j", job_id, f"--format=State,End,{','.join(fields)}")

        def ended() -> list[str] | None:
            state, end, *values = (self.run(*argv).stdout.strip() or "||").split("|")
            return values if end != "Unknown" and state.split()[:1] and state.split()[0] in OVER else None

        return wait_for(ended, f"sacct to know the end of job {job_id}", seconds)


def require() -> None:
    """Skip the test where there can be no cluster."""
    for problem in [*missing_packages(accounting=True), *pyxis.missing()]:
        pytest.skip(f"no Slurm here: {problem.what}; {problem.fix}")


@contextlib.contextmanager
def cluster(*flags: str, below: Path | None = None) -> Iterator[Cluster]:
    """A cluster of its own, which ends with the block, or else with this process."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir=below))
    try:
        manage("up", *flags, f"--while={os.getpid()}", folder=folder)
        yield Cluster(folder)
    finally:
        manage("down", folder=folder)
        with contextlib.suppress(FileNotFoundError):  # `up` failed before it made anything
            folder.rmdir()


def manage(*argv: str, folder: Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """`slurm/testcluster ARGV --dir FOLDER`; `code` is the exit status that it must have (None: any)."""
    command = [sys.executable, str(PROGRAM), *argv, f"--dir={folder}"]
    done = subprocess.run(command, env=outside(), capture_output=True, text=True, timeout=300)
    assert code is None or done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def outside() -> dict[str, str]:
    """This process's environment without any Slurm in it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
    return kept | {"PATH": SEARCH}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)
    return value
