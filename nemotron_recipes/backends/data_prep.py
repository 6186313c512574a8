"""Data preparation as a launch: one plain process on CPUs."""

from __future__ import annotations

from nemotron_recipes.backends.workerfile import MODULE, PART_MODULE, worker_args, worker_file
from nemotron_recipes.data.settings import METHODS, cross_problems
from nemotron_recipes.errors import Problem
from nemotron_recipes.spec import Launch, StageSpec, Tree

FILE = "prep.yaml"
IMPORTS = ("numpy", "tokenizers", "jinja2", "orjson", "yaml", "huggingface_hub")


class DataPrepBackend:
    """See `Backend`. The envelope is its own vocabulary: there is no native one beside it."""

    name = "data_prep"
    kinds = frozenset({"data_prep"})
    methods = frozenset(METHODS)

    def table(self, method: str) -> dict[str, str]:
        return {}

    def native_keys(self, method: str) -> frozenset[str]:
        return frozenset()

    def unread(self, method: str) -> dict[str, str]:
        return {}

    def makes(self, config: Tree) -> str:
        return "data"

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        problems = cross_problems(config["data"], config["method"])
        if nproc != 1:
            problems.append(Problem(f"data prep is one process, not {nproc}", fix="run.nproc_per_node=1"))
        return problems

    def describe(self, stage: StageSpec) -> Launch:
        config = stage.config
        return Launch(
            module=MODULE,
            args=worker_args(stage, FILE),
            files={FILE: worker_file(self.name, stage, method=config["method"], data=config["data"])},
            launcher="plain",
            part_module=PART_MODULE,
            imports=IMPORTS,
            env={"TOKENIZERS_PARALLELISM": "true", "HF_HUB_DISABLE_TELEMETRY": "1"},
        )
