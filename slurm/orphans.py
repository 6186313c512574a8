"""Ends what a job step leaves on a node.

Slurm without cgroups loses sight of a process whose parent ended (a worker whose torchrun was killed, say), and waits
for minutes for its output to close. On a cluster with cgroups it dies when the last task of its step ends, and so it
does here: the node's guard has adopted it, and its environment names its step.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from slurm import proctree

FIRST_SPECIAL_STEP = 0xFFFFFFF0  # ids from here on are the batch script and its like, which have names


def end_orphans(guard: int) -> None:
    """SIGKILL to the children of `guard` whose step has no task left, and to what they started."""
    children = proctree.children(guard)
    steps = {}
    for child in children:
        if title := re.match(r"slurmstepd: \[(\d+)\.(\w+)", _command(child)):
            steps[title[1], title[2] if title[2].isdigit() else ""] = child
    over = []
    for child in set(children) - set(steps.values()):
        step = _step(child)
        if step and not (step in steps and proctree.children(steps[step])):
            over.append(child)
    if over:
        proctree.kill_trees(over)


def _step(pid: int) -> tuple[str, str] | None:
    """Job and step that `pid` belongs to, with step "" for a batch script; None for a daemon."""
    environment = dict(pair.split("=", 1) for pair in _read(pid, "environ").split("\0") if "=" in pair)
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    if not job:
        return None
    return job, step if step.isdigit() and int(step) < FIRST_SPECIAL_STEP else ""


def _command(pid: int) -> str:
    return _read(pid, "cmdline").replace("\0", " ")


def _read(pid: int, name: str) -> str:
    """ "" for a process that has ended or that is not ours to see."""
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), name).read_bytes().decode("utf-8", "replace")
    return ""
