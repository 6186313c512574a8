"""Training backends: each describes a launch. None imports a training library; the worker does that, in the container.

To add one: a module here with a class that has the members of `Backend`, a row in `REGISTRY`, a worker module,
`conf/backend/<name>.yaml`, and a green backend contract suite (tests/contract).
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from nemotron_recipes.errors import Problem
from nemotron_recipes.spec import Launch, StageSpec, Tree

REGISTRY = {
    "trl": "nemotron_recipes.backends.trl:TrlBackend",
    "unsloth": "nemotron_recipes.backends.unsloth:UnslothBackend",
    "megatron_bridge": "nemotron_recipes.backends.megatron_bridge:MegatronBridgeBackend",
    "megatron_convert": "nemotron_recipes.backends.megatron_convert:MegatronConvertBackend",
    "automodel": "nemotron_recipes.backends.automodel:AutoModelBackend",
    "nemo_rl": "nemotron_recipes.backends.nemo_rl:NemoRlBackend",
    "nemo_rl_convert": "nemotron_recipes.backends.nemo_rl_convert:NemoRlConvertBackend",
    "data_prep": "nemotron_recipes.backends.data_prep:DataPrepBackend",
}


class Backend(Protocol):
    """What the planner asks of a backend. Every member is pure: no file is written, nothing is imported late."""

    name: str
    kinds: frozenset[str]  # "data_prep", "train", "convert"
    methods: frozenset[str]  # "sft", "dpo", "kto", "grpo", ...

    def table(self, method: str) -> dict[str, str]:
        """Envelope key (`train.train_iters`) -> native key (`max_steps`); one to one, read in both directions."""
        ...

    def native_keys(self, method: str) -> frozenset[str]:
        """Every key that `backend.native` may hold for this method, dotted where it lies in sections: the fields of the
        real config class. `section.*` stands for a section that takes whatever it is given."""
        ...

    def unread(self, method: str) -> dict[str, str]:
        """Envelope keys that this backend has nothing for, each with what to do instead: to set one is an error."""
        ...

    def makes(self, config: Tree) -> str:
        """The slot of a stage's one output, which is also its kind: "data", "model", "checkpoint", "adapter"."""
        ...

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        """Everything that this backend can't do with a validated config on `nproc` processes in all."""
        ...

    def describe(self, stage: StageSpec) -> Launch:
        """The module, arguments and files to run."""
        ...


def get_backend(name: str) -> Backend:
    """The backend of that name; the schema has checked that it is registered."""
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(import_module(module), attribute)()
