"""What the outside asks of a running cluster: Slurm's own commands, and whether anybody listens."""

from __future__ import annotations

import os
import socket
import subprocess

from nemotron_recipes.errors import NemotronError
from slurm.services import SEARCH
from slurm.spec import Spec


def environment(spec: Spec) -> dict[str, str]:
    """What Slurm's commands need to speak to this cluster."""
    return {"SLURM_CONF": str(spec.files.slurm_conf)}


def run(spec: Spec, *argv: str) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands, with nothing of the caller's own Slurm in its environment."""
    foreign = ("SLURM", "SBATCH_", "SINFO_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    env |= {"PATH": SEARCH, **environment(spec)}
    return subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def accepts(address: str | int) -> bool:
    """Whether somebody listens at a socket's path or at a port of this machine."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address if isinstance(address, str) else ("127.0.0.1", address))
        except (ConnectionError, FileNotFoundError, TimeoutError):
            return False
    return True


def node_states(spec: Spec) -> dict[str, str]:
    """Slurm's word for each node's state, without its marks (`*`: does not answer); {} while slurmctld is down."""
    listed = run(spec, "sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T")
    pairs = [line.split() for line in listed.stdout.splitlines() if listed.returncode == 0]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def sacctmgr(spec: Spec, *words: str) -> None:
    done = run(spec, "sacctmgr", "--immediate", "--quiet", *words)
    if done.returncode:
        raise NemotronError(f"sacctmgr {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
