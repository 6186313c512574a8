"""Training that can't learn: adapters that reach nothing, and a DPO loss that does not leave its start."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.worker.trl.config import LoraSettings

PATIENCE = 30  # steps after the warm-up
_START = math.log(2)  # -log sigmoid(0): where policy and reference are one (arXiv 2305.18290, equation 7)
_STILL = 1e-4  # of the loss; one useful step moves it further


class LeavesLn2(TrainerCallback):
    """JobFailed when the loss of DPO still is ln 2 after the warm-up and `PATIENCE` steps."""

    def __init__(self) -> None:
        self.moved = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs or self.moved:
            return
        self.moved = abs(logs["loss"] - _START) > _STILL
        if not self.moved and state.global_step >= args.get_warmup_steps(state.max_steps) + PATIENCE:
            raise JobFailed(
                f"the loss has been ln 2 = {_START:.4f} for {state.global_step} steps: the model answers as its"
                " reference does, so nothing is learned. Give the adapters layers that matter here (peft.target_modules"
                " with in_proj, up_proj and down_proj: attention alone is too little for nemotron_h), raise"
                " optimizer.lr, or look whether chosen and rejected differ in the data"
            )


def require_targets(model: Any, lora: LoraSettings) -> None:
    """UserError for targets that no layer or parameter of the model has: peft leaves them out without a word."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    missing = [("modules", target) for target in lora.target_modules if not _names(target, modules)]
    missing += [("parameters", target) for target in lora.target_parameters if not _names(target, parameters)]
    if missing:
        have = ", ".join(sorted({name.rpartition(".")[2] for name in modules if name.endswith("_proj")}))
        raise UserError(
            *(
                Problem(f"no layer of this model has {target}", f"peft.target_{kind}", f"take it out; it has: {have}")
                for kind, target in missing
            )
        )


def _names(target: str, names: list[str]) -> bool:
    """As peft matches a list of targets: the whole name, or its end."""
    return any(name == target or name.endswith(f".{target}") for name in names)
