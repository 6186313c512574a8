"""Backend nemo_rl_convert: a checkpoint of NeMo-RL becomes a Hugging Face folder.

One process on the CPU. DPO's shards are read as they are, a file at a time; for GRPO's, NeMo-RL's own converter holds
the whole model in memory.
"""

from __future__ import annotations

from nemotron_recipes.backends import conversion
from nemotron_recipes.errors import Problem
from nemotron_recipes.spec import Launch, StageSpec, Tree

_NATIVE = {"strict": True}
# As docs/design-docs/checkpointing.md of NeMo-RL v0.7.0 has it, started in NeMo-RL's folder.
CONVERTER = ("uv", "run", "--extra", "mcore", "python", "examples/converters/convert_megatron_to_hf.py")


class NemoRlConvertBackend:
    """See `Backend`. `native.strict`: a weight of the base model that the checkpoint lacks ends the export."""

    name = "nemo_rl_convert"
    kinds = frozenset({"convert"})
    methods = frozenset({"export"})

    def table(self, method: str) -> dict[str, str]:
        return {}

    def native_keys(self, method: str) -> frozenset[str]:
        return frozenset(_NATIVE)

    def unread(self, method: str) -> dict[str, str]:
        return dict(conversion.UNREAD)

    def makes(self, config: Tree) -> str:
        return "model"

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        found = list(conversion.problems(self.name, config, ("path",)))
        if config["parallel"] is not None:
            what = "NeMo-RL's converters are one process on the CPU"
            found.append(Problem(what, "parallel", "parallel=null"))
        return found

    def describe(self, stage: StageSpec) -> Launch:
        native = {**_NATIVE, **stage.config["backend"]["native"]}
        needs = ("safetensors.torch", "nemo_rl", "nemo_rl/../examples")
        return conversion.launch(self.name, stage, needs, converter=list(CONVERTER), **native)
