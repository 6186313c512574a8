"""What the unsloth backend adds to trl's: one GPU, whether Unsloth must be there, and what is kept from it."""

from __future__ import annotations

import pytest
import yaml

from nemotron_recipes.backends.trl import TrlBackend
from nemotron_recipes.backends.unsloth import UnslothBackend
from nemotron_recipes.config.schema import TrainConfig
from nemotron_recipes.spec import Output, StageSpec

RUN = {"id": "r", "stage": "s", "dir": "/r/s", "store": "/store", "fingerprint": "f"}


def config_for(native=None, **sections):
    tree = {
        "kind": "train",
        "method": "sft",
        "model": {"path": "artifact:base"},
        "data": {"path": "artifact:rows"},
        "train": {"train_iters": 10, "global_batch_size": 16, "micro_batch_size": 8},
        "optimizer": {"lr": 1e-5},
        "backend": {"name": "unsloth", "native": native or {}},
        "outputs": {"model": "made"},
    }
    for name, section in sections.items():
        tree[name] = {**(tree.get(name) or {}), **section}
    return TrainConfig.model_validate(tree).model_dump()


def launch_for(backend, config):
    return backend.describe(StageSpec(config, {}, (Output("model", "made", "model"),), RUN))


def test_it_is_the_worker_of_trl_with_one_key_more():
    plain = launch_for(TrlBackend(), config_for())
    under = launch_for(UnslothBackend(), config_for())
    one, other = (yaml.safe_load(launch.files["train.yaml"]) for launch in (plain, under))
    assert other.pop("unsloth") == {"required": True}
    assert one == other
    assert under.env["UNSLOTH_COMPILE_LOCATION"].startswith("/r/s/")
    assert under.env["UNSLOTH_DISABLE_STATISTICS"] == "1"


def test_it_need_not_be_there_where_the_recipe_says_so():
    config = config_for({"require_unsloth": False})
    assert UnslothBackend().check(config, 1) == []
    tree = yaml.safe_load(launch_for(UnslothBackend(), config).files["train.yaml"])
    assert tree["unsloth"] == {"required": False}
    assert "require_unsloth" not in tree["trainer"]


@pytest.mark.parametrize(
    ("nproc", "config", "words"),
    [
        (2, {}, "Unsloth trains on one GPU, not on 2"),
        (1, {"native": {"require_unsloth": "yes"}}, "should be bool, not 'yes'"),
        (1, {"model": {"load_in_4bit": True}}, "a base in 4 bits can't be trained itself"),
        (1, {"model": {"load_in_4bit": True, "dtype": "float32"}, "peft": {}}, "in bfloat16"),
        (1, {"peft": {"target_modules": ["*_proj"]}}, "'*_proj' is a pattern"),
        (1, {"peft": {"target_modules": ["*.out_proj"]}}, "leave out_proj out"),
    ],
)
def test_refused(nproc, config, words):
    (problem,) = UnslothBackend().check(config_for(**config), nproc)
    assert words in str(problem)


def test_trl_alone_knows_no_key_of_it():
    assert "require_unsloth" in UnslothBackend().native_keys("sft") - TrlBackend().native_keys("sft")


def test_names_of_layers_as_automodel_has_them_mean_the_same():
    peft = {"target_modules": ["*.q_proj", "v_proj"]}
    tree = yaml.safe_load(launch_for(UnslothBackend(), config_for(peft=peft)).files["train.yaml"])
    assert tree["peft"]["target_modules"] == ["q_proj", "v_proj"]
