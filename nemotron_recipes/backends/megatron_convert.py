"""Backend megatron_convert: weights between Hugging Face's folders and Megatron's checkpoints, by Megatron-Bridge.

import   model.path -> a checkpoint to train from; `checkpoint.pretrained_checkpoint` of a training stage names it
export   a checkpoint that training has written -> a Hugging Face folder
merge    a checkpoint of LoRA adapters, and the one they were trained on -> a Hugging Face folder with both in one

One process on the CPU: the whole model must fit into the memory of one node.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemotron_recipes.backends.workerfile import MODULE, worker_args, worker_file
from nemotron_recipes.errors import Problem
from nemotron_recipes.spec import Launch, StageSpec, Tree

FILE = "convert.yaml"
_NATIVE = {"trust_remote_code": False, "strict": True}
_NEEDED = {"import": (), "export": ("path",), "merge": ("path", "base")}
_WHAT = {"path": "the checkpoint to convert", "base": "the checkpoint that the adapters were trained on"}


class MegatronConvertBackend:
    """See `Backend`. The envelope is its own vocabulary; `native` says how much of a model is taken on trust."""

    name = "megatron_convert"
    kinds = frozenset({"convert"})
    methods = frozenset(_NEEDED)

    def table(self, method: str) -> dict[str, str]:
        return {}

    def native_keys(self, method: str) -> frozenset[str]:
        return frozenset(_NATIVE)

    def makes(self, config: Tree) -> str:
        return "checkpoint" if config["method"] == "import" else "model"

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        problems = list(_checkpoint_problems(config))
        if nproc != 1:
            problems.append(Problem(f"a conversion is one process, not {nproc}", fix="run.nproc_per_node=1"))
        if config["model"]["arch"]:
            problems.append(Problem("megatron_convert makes no tiny model", "model.arch", "~model.arch"))
        for key, value in config["backend"]["native"].items():
            if not isinstance(value, bool):
                problems.append(Problem(f"'backend.native.{key}' should be bool, not {value!r}"))
        return problems

    def describe(self, stage: StageSpec) -> Launch:
        config = stage.config
        own = {
            "method": config["method"],
            "dtype": config["model"]["dtype"],
            **_NATIVE,
            **config["backend"]["native"],
        }
        return Launch(
            module=MODULE,
            args=worker_args(stage, FILE),
            files={FILE: worker_file(self.name, stage, **own)},
            launcher="plain",
            env={"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"},
        )


def _checkpoint_problems(config: Tree) -> Iterator[Problem]:
    method, given = config["method"], config["checkpoint"]
    for name, value in given.items():
        if name in _NEEDED[method] and value is None:
            what = f"convert {method} needs {_WHAT[name]}"
            yield Problem(what, fix=f"checkpoint.{name}=artifact:NAME or a folder")
        elif name not in _NEEDED[method] and value is not None:
            yield Problem(f"'checkpoint.{name}' means nothing for convert {method}", fix=f"checkpoint.{name}=null")
