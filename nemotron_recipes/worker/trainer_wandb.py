"""The W&B logging that a trainer brings along, pointed at the W&B run of its stage.

Always offline: it writes below the stage's folder and waits for nobody; the mirror tells W&B what is there while it
grows (mirror/telling.py). Where the SDK is missing the trainer logs nothing to W&B.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import Tree


@dataclass(frozen=True)
class TrainerRun:
    """The W&B run of a stage, and the folder in which the SDK keeps what is not sent yet."""

    id: str
    project: str
    entity: str | None
    group: str
    stage: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """For every process of the stage: whatever opens a W&B run there opens this one, and keeps to figures."""
        named = {"WANDB_RUN_ID": self.id, "WANDB_NAME": self.id, "WANDB_RUN_GROUP": self.group}
        named |= {"WANDB_PROJECT": self.project, "WANDB_JOB_TYPE": self.stage, "WANDB_DIR": str(self.folder)}
        off = dict.fromkeys(("DISABLE_GIT", "DISABLE_CODE", "SILENT", "X_DISABLE_META", "X_DISABLE_STATS"), "true")
        off |= {"X_SAVE_REQUIREMENTS": "false", "ERROR_REPORTING": "false", "CONSOLE": "off"}
        named |= {f"WANDB_{name}": value for name, value in off.items()}
        named |= {"WANDB_MODE": "offline", "WANDB_RESUME": "allow"}
        named |= {"WANDB_LOG_MODEL": "false", "WANDB_WATCH": "false"}  # of transformers
        return {**named, "WANDB_ENTITY": self.entity} if self.entity else named

    def megatron_bridge(self) -> Tree:
        """Fields of its LoggerConfig; its `wandb.init` takes the rest from the environment (training/state.py)."""
        place = {"wandb_save_dir": str(self.folder), "wandb_entity": self.entity}
        return {"wandb_project": self.project, "wandb_exp_name": self.id, **place}

    def nemo_rl(self) -> Tree:
        """Its section `logger.wandb`, handed to `wandb.init`, which takes the rest from the environment. What it would
        upload besides, the sources of its folder, stays here: the mirror tells W&B what was logged."""
        named = {"project": self.project, "name": self.id}
        return {**named, "entity": self.entity} if self.entity else named

    def automodel(self) -> Tree:
        """Keys of its section `wandb`, which are handed to `wandb.init` (components/loggers)."""
        named = {"project": self.project, "name": self.id, "id": self.id, "group": self.group}
        named |= {"dir": str(self.folder), "mode": "offline", "resume": "allow"}
        return {**named, "entity": self.entity} if self.entity else named


def find_trainer_run(folder: StageDir, run: str, stage: str) -> TrainerRun | None:
    """None: the run isn't mirrored, or the SDK isn't here."""
    target = Journal(folder.path.parent).target
    if target is None or importlib.util.find_spec("wandb") is None:
        return None
    return TrainerRun(target.runs[stage], target.project, target.entity, run, stage, folder.path)


def point(found: TrainerRun | None) -> None:
    """Let this process, and what it starts, log to that run alone."""
    if found is not None:
        os.environ.update(found.environment)
