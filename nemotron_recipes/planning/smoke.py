"""`--smoke N`: the first N steps of a stage with saves in between, from which the whole run's time is projected.

Only envelope keys are changed, so it works with every backend. The steps between the first saves are timed: what is
before them holds compilation and warm-up, what is behind them the validation.
"""

from __future__ import annotations

import copy

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.spec import Tree

LEAST = 5  # steps: fewer have no two saves before the last one


def save_interval(steps: int) -> int:
    """Steps between saves: of 10 steps after 4, after 8 and at the end."""
    return max(1, 2 * steps // 5)


def length(config: Tree) -> Tree:
    """How long a training stage is, in steps: steps, save_interval, eval_interval."""
    train, steps = config["train"], config["train"]["train_iters"]
    return {
        "steps": steps,
        "save_interval": config["checkpoint"]["save_interval"] or steps,
        "eval_interval": train["eval_interval"] or steps,
    }


def shortened(config: Tree, steps: int) -> tuple[Tree, dict[str, object]]:
    """(the config of a smoke run of `steps` steps, dotted key -> value of what that changes).

    UserError: the stage continues an earlier run, or is no longer than that.
    """
    problems = []
    for key, given in (("checkpoint.load", config["checkpoint"]["load"]), ("train.resume", config["train"]["resume"])):
        if given:
            problems.append(Problem(f"a smoke run starts anew, but {key} is set", fix=f"leave {key} out"))
    if steps >= config["train"]["train_iters"]:
        what = f"--smoke {steps} is no shorter than the run: train.train_iters is {config['train']['train_iters']}"
        problems.append(Problem(what, fix="run it without --smoke"))
    if problems:
        raise UserError(*problems)
    short = copy.deepcopy(config)
    values: dict[str, object] = {
        "train.train_iters": steps,
        "train.eval_interval": None,  # at the end alone
        "train.log_interval": min(config["train"]["log_interval"], save_interval(steps)),
        "scheduler.lr_warmup_iters": min(config["scheduler"]["lr_warmup_iters"], steps - 1),
        "checkpoint.save_interval": save_interval(steps),
    }
    for slot, name in config["outputs"].items():
        if name is not None:  # it must not become the newest version of the real thing
            values[f"outputs.{slot}"] = f"{name}-smoke"
    changed = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if short[section][name] != value:
            short[section][name] = changed[key] = value
    return short, changed
