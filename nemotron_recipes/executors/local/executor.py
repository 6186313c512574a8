"""Executor `local`: this machine, one node, as a background process group that outlives the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nemotron_recipes.errors import Problem
from nemotron_recipes.executors import checks, nemo_adapter, torchrun
from nemotron_recipes.executors.driven import DrivenExecutor, DrivenProfile, driver_command
from nemotron_recipes.rundir import RUN_ID_ENV, StageDir
from nemotron_recipes.spec import Plan, Rendered, RenderedStage, StagePlan


class LocalProfile(DrivenProfile):
    """What a profile in env.toml, or `run.*` on the command line, may set."""

    executor: Literal["local"] = "local"


class LocalExecutor(DrivenExecutor):
    """The `Executor` for this machine. A driver (driver.py) carries out what `render` has laid down."""

    name = "local"
    profile_model = LocalProfile

    def check(self, stage: StagePlan) -> list[Problem]:
        """Secrets that are not set or would be written, reserved names, and text that no process can receive."""
        return [*checks.secret_problems(stage), *checks.env_problems(stage), *checks.text_problems(stage, _argv(stage))]

    def _unfit(self, plan: Plan) -> Iterator[Problem]:
        yield from nemo_adapter.home_problems()

    def render(self, plan: Plan) -> Rendered:
        """The stages that run, and the driver's command line."""
        stages = tuple(_render_stage(plan, stage) for stage in plan.stages if stage.reused is None)
        return Rendered(stages, driver_command(plan))


def _render_stage(plan: Plan, stage: StagePlan) -> RenderedStage:
    launch, folder = stage.launch, StageDir(Path(stage.directory))
    return RenderedStage(
        name=stage.name,
        files={str(folder.files / name): text for name, text in launch.files.items()},
        argv=_argv(stage),
        env={
            "PYTHONSAFEPATH": "1",  # `-m` looks for modules in the environment alone, not in the stage's folder
            "PYTHONUNBUFFERED": "1",
            **launch.env,
            **stage.placement.options.get("env", {}),
            RUN_ID_ENV: plan.id,
        },
        cwd=stage.directory,
    )


def _argv(stage: StagePlan) -> tuple[str, ...]:
    launch = stage.launch
    if launch.launcher == "plain":
        return (sys.executable, "-m", launch.module, *launch.args)
    nproc, log_dir = stage.placement.nproc_per_node, Path(stage.directory) / "logs" / "torchrun"
    return torchrun.command(launch.module, launch.args, nproc, log_dir)
