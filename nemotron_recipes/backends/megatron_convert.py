"""Backend megatron_convert: weights between Hugging Face's folders and Megatron's checkpoints, by Megatron-Bridge.

import   model.path -> a checkpoint to train from; `checkpoint.pretrained_checkpoint` of a training stage names it
export   a checkpoint that training has written -> a Hugging Face folder
merge    a checkpoint of LoRA adapters, and the one they were trained on -> a Hugging Face folder with both in one

One process on the CPU, and the whole model must fit into the memory of one node; or, with `parallel`, several that
share it out, each on a GPU.
"""

from __future__ import annotations

from nemotron_recipes.backends import conversion
from nemotron_recipes.errors import Problem
from nemotron_recipes.spec import Launch, StageSpec, Tree

_NATIVE = {"trust_remote_code": False, "strict": True}
_IMPORTS = ("megatron.bridge:AutoBridge", "megatron.bridge.training.model_load_save:temporary_distributed_context")
_MERGE = (
    "megatron.bridge.peft.lora:LoRA",
    "megatron.core.dist_checkpointing",
    "megatron.bridge.training.checkpointing:apply_peft_adapter_filter_to_state_dict",
)
_NEEDED = {"import": (), "export": ("path",), "merge": ("path", "base")}


class MegatronConvertBackend:
    """See `Backend`. The envelope is its own vocabulary; `native` says how much of a model is taken on trust."""

    name = "megatron_convert"
    kinds = frozenset({"convert"})
    methods = frozenset(_NEEDED)

    def table(self, method: str) -> dict[str, str]:
        return {}

    def native_keys(self, method: str) -> frozenset[str]:
        return frozenset(_NATIVE)

    def unread(self, method: str) -> dict[str, str]:
        return dict(conversion.UNREAD)

    def makes(self, config: Tree) -> str:
        return "checkpoint" if config["method"] == "import" else "model"

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        needed = conversion.problems(self.name, config, _NEEDED[config["method"]])
        return [*needed, *conversion.layout_problems(config, nproc)]

    def describe(self, stage: StageSpec) -> Launch:
        needs = (*_IMPORTS, *(_MERGE if stage.config["method"] == "merge" else ()))
        native = {**_NATIVE, **stage.config["backend"]["native"]}
        return conversion.launch(self.name, stage, needs, parallel=stage.config["parallel"], **native)
