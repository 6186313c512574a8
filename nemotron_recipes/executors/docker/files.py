"""The files in a run folder through which a driver and its containers speak. Standard library only.

secrets.json                          mode 0600; there while a stage runs
<stage>/logs/attempt-N/container.json  how the stage's processes ended, written by the container's first process;
                                       container.node-K.json of another host's
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from nemotron_recipes.rundir import RunDir, StageDir, read_json, write_sealed

NODE_ENV = "PET_NODE_RANK"  # torchrun's, too: which of several hosts it is
KILLED = 137  # the exit code of a container whose first process could not say how it ended


@dataclass(frozen=True)
class Report:
    """stopped: it was asked to stop before it ended; time: seconds since the epoch."""

    exit_code: int
    stopped: bool
    time: float


def secrets(run: RunDir) -> Path:
    return run.path / "secrets.json"


def write_report(stage: StageDir, attempt: int, report: Report, node: int = 0) -> None:
    write_sealed(_report(stage, attempt, node), asdict(report), kind="container")


def read_report(stage: StageDir, attempt: int, node: int = 0) -> Report | None:
    """None: the container's first process was killed, or never started."""
    tree = read_json(_report(stage, attempt, node))
    return Report(**tree) if tree else None


def _report(stage: StageDir, attempt: int, node: int) -> Path:
    return stage.logs(attempt) / ("container.json" if node == 0 else f"container.node-{node}.json")
