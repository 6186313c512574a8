"""The worker file that every backend's launch begins with: docs/contracts.md says what it holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import StageSpec, Tree

MODULE = "nemotron_recipes.worker"
PART_MODULE = "nemotron_recipes.worker.part"


def worker_file(worker: str, stage: StageSpec, **own: Any) -> str:
    """Its text: what all workers have in common, then the keys of this one."""
    common = {
        "worker": worker,
        "run": stage.run,
        "inputs": {key: asdict(artifact) for key, artifact in stage.inputs.items()},
        "outputs": [asdict(output) for output in stage.outputs],
    }
    return yaml_text({**common, **own})


def worker_args(stage: StageSpec, name: str) -> tuple[str, ...]:
    """The worker's arguments, for a worker file of that name."""
    return ("--config", str(file_path(stage, name)))


def file_path(stage: StageSpec, name: str) -> Path:
    """Where a file of the launch lies when the stage runs."""
    return StageDir(Path(stage.run["dir"])).files / name


def yaml_text(tree: Tree) -> str:
    """YAML as all files of a Plan are written."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
