"""What the trl backend refuses, and how it says so."""

import pytest

from nemotron_recipes.backends.trl import TrlBackend
from nemotron_recipes.config.schema import TrainConfig


def problems(method="sft", nproc=1, **sections):
    tree = {
        "kind": "train",
        "method": method,
        "model": {"path": "artifact:base"},
        "data": {"path": "artifact:rows"},
        "train": {"train_iters": 10, "global_batch_size": 16, "micro_batch_size": 8},
        "optimizer": {"lr": 1e-5},
        "backend": {"name": "trl"},
        "outputs": {"model": "made"},
    }
    if method != "sft":
        tree[method] = {}
    for name, section in sections.items():
        tree[name] = section if section is None else {**(tree.get(name) or {}), **section}
    return [str(p) for p in TrlBackend().check(TrainConfig.model_validate(tree).model_dump(), nproc)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nproc": 3}, "can't be divided into micro batches of 8 on 3 processes"),
        ({"method": "kto", "train": {"micro_batch_size": 1}}, "train.micro_batch_size=2"),
        ({"method": "grpo", "grpo": {"num_generations": 5}}, "no multiple of grpo.num_generations 5"),
        ({"method": "grpo", "grpo": {"num_generations": 16}, "train": {"eval_interval": 5}}, "eval_interval=null"),
        ({"method": "grpo", "grpo": {"rewards": ["exact_mach"]}}, "did you mean 'exact_match'"),
        ({"method": "grpo", "grpo": {"rewards": ["format"]}}, "needs grpo.reward_settings.format_pattern"),
        ({"method": "grpo", "grpo": {"rewards": ["judges"]}}, "needs grpo.reward_settings.judges"),
        ({"method": "grpo", "grpo": {"reward_settings": {"judges": "j.yaml"}}}, "means nothing without the reward"),
        ({"method": "grpo", "grpo": {"reward_weights": [1.0, 2.0]}}, "has 2 weights for 1 rewards"),
        ({"method": "grpo", "grpo": {"rewards": ["format"], "reward_settings": {"format_pattern": "("}}}, "no regular"),
        ({"model": {"arch": {"hidden_size": 8}}}, "model.arch shapes the model that the project makes"),
        ({"model": {"path": "tiny", "arch": {"hiden_size": 8}}}, "did you mean 'hidden_size'"),
        ({"model": {"path": "tiny", "arch": {"hidden_size": "8"}}}, "should be int, not '8'"),
        ({"peft": {"target_modules": ["out_proj"]}}, "leave out_proj out"),
        ({"backend": {"native": {"output_dir": "/tmp"}}}, "output_dir can't be set: everything goes to the run folder"),
        ({"backend": {"native": {"report_to": "tensorboard"}}}, "report_to can't be set: metrics.jsonl is the record"),
        ({"backend": {"native": {"packing": True}}}, "packing can't be set: data prep has done this"),
        ({"backend": {"native": {"gradient_checkpointing": "no"}}}, "should be bool, not 'no'"),
        ({"backend": {"native": {"dataloader_num_workers": True}}}, "should be int, not True"),
    ],
)
def test_refused(arguments, message):
    found = problems(**arguments)
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize(
    "arguments",
    [
        {"nproc": 2},
        {"method": "grpo", "grpo": {"num_generations": 8}},
        {"model": {"path": "tiny", "arch": {"hidden_size": 8, "routed_scaling_factor": 1}}},
        {"backend": {"native": {"gradient_checkpointing": False, "neftune_noise_alpha": 5, "report_to": "wandb"}}},
        {"method": "dpo", "backend": {"native": {"max_length": 512}}},
    ],
)
def test_accepted(arguments):
    assert problems(**arguments) == []
