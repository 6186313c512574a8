"""YARN's fields that importers leave None, which Megatron-Core multiplies with."""

import sys
from types import ModuleType, SimpleNamespace

from nemotron_recipes.worker.megatron_bridge.config import YARN, repair_yarn
from nemotron_recipes.worker.megatron_convert.stage import repair_imports


def test_only_what_is_none_is_filled_in():
    model = SimpleNamespace(position_embedding_type="yarn", **dict.fromkeys(YARN), yarn_rotary_scaling_factor=4.0)
    model.yarn_mscale_all_dim = 1.0
    assert set(repair_yarn(model)) == YARN.keys() - {"yarn_mscale_all_dim"}
    assert vars(model) == {
        **YARN,
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_mscale_all_dim": 1.0,
    }
    assert repair_yarn(model) == []


def test_a_model_without_yarn_is_left_alone():
    model = SimpleNamespace(position_embedding_type="rope", **dict.fromkeys(YARN))
    assert repair_yarn(model) == [] and model.yarn_mscale is None
    assert repair_yarn(SimpleNamespace(position_embedding_type="yarn")) == []  # a version without these fields


def test_a_conversion_repairs_what_the_importer_made(monkeypatch):
    """A fake AutoBridge, whose importer leaves None as those of 0.4 to 0.6 do."""

    class FakeBridge:
        def to_megatron_provider(self, load_weights=True):
            return SimpleNamespace(position_embedding_type="yarn", yarn_beta_fast=None, weights=load_weights)

    fake = ModuleType("megatron.bridge")
    fake.AutoBridge = FakeBridge
    monkeypatch.setitem(sys.modules, "megatron", ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.bridge", fake)
    repair_imports()
    provider = FakeBridge().to_megatron_provider(load_weights=False)
    assert (provider.yarn_beta_fast, provider.weights) == (32.0, False)
