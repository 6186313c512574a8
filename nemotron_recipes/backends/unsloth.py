"""Backend unsloth: TRL's trainers under Unsloth, on one GPU. The trl backend's worker, table and rules; what differs is
here. Nothing of Unsloth's is imported: the worker does that, before anything else."""

from __future__ import annotations

from dataclasses import replace

from nemotron_recipes.backends.trl import TrlBackend
from nemotron_recipes.errors import Problem
from nemotron_recipes.spec import Launch, StageSpec, Tree

REQUIRE = "require_unsloth"  # false: where Unsloth can't be used, train with TRL alone and say so


class UnslothBackend(TrlBackend):
    """See `Backend`."""

    name = "unsloth"

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        problems = super().check(config, nproc)
        if nproc > 1:
            fix = "run.nproc_per_node=1, or backend=trl"
            problems.append(Problem(f"Unsloth trains on one GPU, not on {nproc}", "run.nproc_per_node", fix))
        return problems

    def describe(self, stage: StageSpec) -> Launch:
        launch = super().describe(stage)
        env = {
            **launch.env,
            "UNSLOTH_COMPILE_LOCATION": f"{stage.run['dir']}/unsloth_compiled_cache",  # else wherever it is started
            "UNSLOTH_DISABLE_STATISTICS": "1",  # it reports each start to the hub
        }
        return replace(launch, env=env)

    def imports(self, config: Tree) -> tuple[str, ...]:
        """Unsloth before all others, as the worker has it."""
        required = config["backend"]["native"].get(REQUIRE, True)
        return (*(("unsloth",) if required else ()), *super().imports(config))

    def _own(self, method: str) -> dict[str, str]:
        return {**super()._own(method), REQUIRE: "bool"}

    def _worker_keys(self, native: Tree) -> Tree:
        return {"unsloth": {"required": native.get(REQUIRE, True)}}
