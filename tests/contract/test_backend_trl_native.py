"""The trl backend against the installed TRL: its field names, and each value of the table read back from the object."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
import yaml

from nemotron_recipes.backends.trl import TrlBackend, native_values
from nemotron_recipes.config.schema import TrainConfig
from nemotron_recipes.spec import Output, StageSpec

ROOT = Path(__file__).parent.parent.parent
FIELDS = ROOT / "nemotron_recipes" / "backends" / "trl_fields.json"
RUN = {"id": "r", "stage": "s", "dir": "/r/s", "store": "/store", "fingerprint": "f"}
pytestmark = pytest.mark.e2e


def config_for(method, **sections):
    """No value is TRL's default, so that a value that doesn't arrive is seen."""
    tree = {
        "kind": "train",
        "method": method,
        "model": {"path": "artifact:base", "dtype": "float32"},
        "data": {"path": "artifact:rows"},
        "train": {
            "train_iters": 70,
            "global_batch_size": 48,
            "micro_batch_size": 6,
            "seed": 17,
            "log_interval": 3,
            "eval_interval": 11,
        },
        "optimizer": {
            "lr": 3e-5,
            "weight_decay": 0.03,
            "adam_beta1": 0.8,
            "adam_beta2": 0.7,
            "adam_eps": 3e-7,
            "clip_grad": 0.3,
        },
        "scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 4},
        "checkpoint": {"save_interval": 13, "keep": 5},
        "dpo": {"beta": 0.37} if method == "dpo" else None,
        "kto": {"beta": 0.37, "desirable_weight": 1.2, "undesirable_weight": 0.9} if method == "kto" else None,
        "grpo": (
            {
                "num_generations": 4,
                "max_completion_length": 33,
                "temperature": 0.6,
                "kl_beta": 0.02,
                "reward_weights": [0.5],
            }
            if method == "grpo"
            else None
        ),
        "backend": {"name": "trl"},
        "outputs": {"model": "made"},
    }
    for name, section in sections.items():
        tree[name] = {**(tree[name] or {}), **section}
    return TrainConfig.model_validate(tree).model_dump()


@pytest.fixture(scope="module")
def classes():
    from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

    return {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig, "grpo": GRPOConfig}


def test_the_field_file_is_that_of_the_installed_versions():
    fields = runpy.run_path(str(ROOT / "tools" / "trl_fields.py"))["fields"]()
    assert json.loads(FIELDS.read_text()) == fields, "run tools/trl_fields.py"


@pytest.mark.parametrize("method", sorted(TrlBackend.methods))
def test_native_keys_are_the_fields_of_the_class(classes, method):
    names = {field.name for field in dataclasses.fields(classes[method]) if field.init}
    assert TrlBackend().native_keys(method) == names


@pytest.mark.parametrize("method", sorted(TrlBackend.methods))
def test_every_value_of_the_table_arrives(classes, method, tmp_path):
    """Envelope -> worker file -> YAML -> the real config object, and back through the table."""
    config = config_for(method)
    assert TrlBackend().check(config, nproc=2) == []
    launch = TrlBackend().describe(StageSpec(config, {}, (Output("model", "made", "model"),), RUN, nproc=2))
    trainer = yaml.safe_load(launch.files["train.yaml"])["trainer"]
    eval_batch = {"per_device_eval_batch_size": 4} if method == "grpo" else {}
    real = classes[method](**trainer, **eval_batch, output_dir=str(tmp_path), use_cpu=True, report_to=[])
    untouched = classes[method](output_dir=str(tmp_path), use_cpu=True, report_to=[])
    converted = {
        "train.global_batch_size": 48 // (6 * 2),
        "optimizer.name": "adamw_torch",
        "scheduler.lr_decay_style": "cosine",
        "model.dtype": False,
    }
    same_as_default = {"optim", "bf16"}  # TRL turns bf16 on where it can
    for key, native in TrlBackend().table(method).items():
        section, _, name = key.partition(".")
        found = getattr(real, native)
        found = getattr(found, "value", found)
        assert found == converted.get(key, config[section][name]), key
        assert type(found) is type(converted.get(key, config[section][name])) or native in ("logging_steps",), key
        if native not in same_as_default and native != "lr_scheduler_type":
            assert found != getattr(untouched, native), f"{key}: the test can't tell it from the default"


def test_what_null_means():
    values = native_values(config_for("sft", train={"eval_interval": None}, checkpoint={"save_interval": None}), 1)
    assert values["eval_steps"] == values["save_steps"] == 70


@pytest.mark.parametrize(
    ("style", "steps"),
    [("constant", [1 / 4, 1.0, 1.0]), ("linear", [1 / 4, 1.0, 0.5]), ("cosine", [1 / 4, 1.0, 0.5])],
)
def test_the_schedules_warm_up_and_decay(style, steps):
    """Transformers' own "constant" would leave out the warm-up."""
    import torch
    from transformers import get_scheduler

    config = config_for("sft", train={"train_iters": 44}, scheduler={"lr_decay_style": style, "lr_warmup_iters": 4})
    values = native_values(config, 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(values["lr_scheduler_type"], optimizer, values["warmup_steps"], values["max_steps"])
    rates = []
    for _ in range(44):
        optimizer.step()
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    assert [rates[1], rates[4], rates[24]] == pytest.approx(steps)
