"""Data preparation as a launch: one plain process on CPUs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import yaml

from nemotron_recipes.data.settings import METHODS, cross_problems
from nemotron_recipes.errors import Problem
from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import Artifact, Launch, Output, Tree

FILE = "prep.yaml"


class DataPrepBackend:
    """See `Backend`. The envelope is its own vocabulary: there is no native one beside it."""

    name = "data_prep"
    kinds = frozenset({"data_prep"})
    methods = frozenset(METHODS)

    def table(self, method: str) -> dict[str, str]:
        return {}

    def native_keys(self, method: str) -> frozenset[str]:
        return frozenset()

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        problems = cross_problems(config["data"], config["method"])
        if nproc != 1:
            problems.append(Problem(f"data prep is one process, not {nproc}", fix="run.nproc_per_node=1"))
        return problems

    def describe(
        self,
        config: Tree,
        inputs: dict[str, Artifact],
        outputs: tuple[Output, ...],
        run: Tree,
        resume_from: str | None,
        nproc: int,
    ) -> Launch:
        content = {
            "worker": self.name,
            "run": run,
            "inputs": {key: asdict(artifact) for key, artifact in inputs.items()},
            "outputs": [asdict(output) for output in outputs],
            "method": config["method"],
            "data": config["data"],
        }
        return Launch(
            module="nemotron_recipes.worker",
            args=("--config", str(StageDir(Path(run["dir"])).files / FILE)),
            files={FILE: yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)},
            launcher="plain",
            env={"TOKENIZERS_PARALLELISM": "true", "HF_HUB_DISABLE_TELEMETRY": "1"},
        )
