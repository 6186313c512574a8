"""The one worker under Unsloth and without it: which it used, what it asks for, what a base in 4 bits comes to."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from nemotron_recipes.errors import JobFailed, UserError
from nemotron_recipes.tiny.model import write_model
from nemotron_recipes.tiny.tokenizer import write_tokenizer
from nemotron_recipes.worker.trl.config import read_config
from nemotron_recipes.worker.trl.engine import Plain, Unsloth, choose
from tests.helpers import fake_unsloth
from tests.helpers.training import ARCH, context_for, prepared, worker_file

pytestmark = pytest.mark.e2e

LORA = {"dim": 4, "alpha": 8, "target_parameters": ["mixer.experts.up_proj"], "target_modules": ["q_proj", "in_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, ARCH, seed=0)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "sft", "sft", train=16, held_out=4)


def file_for(stage: Path, base: Path, data: Path, required: bool, **changes):
    path = worker_file(stage, data, model=base, peft=LORA, evaluation={"rows": 0}, train={"train_iters": 2})
    tree = yaml.safe_load(path.read_text())
    tree["unsloth"] = {"required": required}
    for section, values in changes.items():
        tree[section] |= values
    path.write_text(yaml.safe_dump(tree))
    return path


def settings_for(required: bool):
    return read_config({"method": "sft", "trainer": {}, "unsloth": {"required": required}})


def without_unsloth(monkeypatch, error):
    real = builtins.__import__

    def fake_import(name, *rest, **more):
        if name == "unsloth":
            raise error
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", fake_import)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("no unsloth", name="unsloth"), "it is not installed"),
        (NotImplementedError("Unsloth cannot find any torch accelerator? You need a GPU."), "You need a GPU"),
    ],
)
def test_where_it_cannot_be_used_it_says_so(monkeypatch, error, reason):
    without_unsloth(monkeypatch, error)
    with pytest.raises(UserError, match=reason) as refused:
        choose(settings_for(required=True))
    assert "require_unsloth=false" in str(refused.value)
    engine = choose(settings_for(required=False))
    assert isinstance(engine, Plain) and reason in engine.words


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("no zoo", name="unsloth_zoo"),
        ImportError("cannot import name 'patch' from 'unsloth_zoo'", name="unsloth_zoo"),
    ],
)
def test_a_half_installed_one_is_an_error_even_where_it_is_not_required(monkeypatch, error):
    without_unsloth(monkeypatch, error)
    with pytest.raises(UserError, match="unsloth_zoo") as refused:
        choose(settings_for(required=False))
    assert "unsloth.Dockerfile" in str(refused.value)


def test_four_bits_without_bitsandbytes_name_the_image(base, monkeypatch):
    """Transformers raises a plain ImportError, wherever bitsandbytes is missing or too old."""
    from transformers import AutoModelForCausalLM

    def fake_load(*given, **more):
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fake_load)
    with pytest.raises(UserError, match="requires bitsandbytes") as refused:
        Plain().load(base, settings_for(required=False), lambda: 8)
    assert "unsloth.Dockerfile" in str(refused.value)


def test_under_the_fake_it_trains_and_says_so(tmp_path, base, data, monkeypatch, capsys):
    """What the real loader and adapters get; and the output is a model like every backend's."""
    import torch
    from transformers import AutoModelForCausalLM

    from nemotron_recipes.worker.trl import run

    asked = fake_unsloth.install(monkeypatch)
    config, context = context_for(file_for(tmp_path / "stage", base, data, required=True))
    run(config, context)
    (_, loading), (_, adapting) = asked.calls
    assert loading["model_name"] == str(base) and loading["use_exact_model_name"]
    assert loading["dtype"] is torch.float32 and not loading["load_in_4bit"] and not loading["full_finetuning"]
    assert 32 < loading["max_seq_length"] <= 64  # the longest pack of this data
    assert adapting["target_parameters"] == ["mixer.experts.up_proj"]
    assert adapting["use_gradient_checkpointing"] is False  # as the recipe says
    words = f"Unsloth {fake_unsloth.VERSION}"
    assert context.facts["trained_with"] == context.metadata["trained_with"] == words
    assert f"training with {words}" in capsys.readouterr().out
    folder = context.output("model")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_base_with_missing_weights_is_refused_before_unsloth_loads_it(tmp_path, base, data, monkeypatch):
    import shutil

    from safetensors.torch import load_file, save_file

    torn = tmp_path / "torn"
    shutil.copytree(base, torn)
    weights = load_file(torn / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("q_proj.weight"))]
    save_file(weights, torn / "model.safetensors", metadata={"format": "pt"})
    asked = fake_unsloth.install(monkeypatch)
    settings = read_config(context_for(file_for(tmp_path / "stage", torn, data, required=True))[0])
    with pytest.raises(UserError, match="random weights are never filled in"):
        Unsloth("fake").load(torn, settings, lambda: 64)
    assert asked.calls == []


def test_weights_that_are_a_pickle_are_not_opened(tmp_path, base):
    import pickle
    import shutil

    class Planted:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    folder = tmp_path / "pickled"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Planted()}))
    with pytest.raises(UserError, match="no model could be loaded from .*safetensors"):
        Plain().load(folder, settings_for(required=False), lambda: 8)
    assert not (tmp_path / "executed").exists()


def test_four_bits_that_were_left_out_end_the_run(tmp_path, base, data, monkeypatch):
    """As the real one does where it can't use bitsandbytes: a message in the log, and 16 bits."""
    from nemotron_recipes.worker.trl import run

    fake_unsloth.install(monkeypatch)
    changes = {"model": {"load_in_4bit": True, "dtype": "bfloat16"}}
    config, context = context_for(file_for(tmp_path / "stage", base, data, required=True, **changes))
    with pytest.raises(JobFailed, match="no weight of it is"):
        run(config, context)


def test_data_packed_to_another_length_than_the_recipe_says_is_refused(tmp_path, base, data):
    from nemotron_recipes.worker.trl import run

    path = file_for(tmp_path / "stage", base, data, required=False)
    tree = yaml.safe_load(path.read_text()) | {"pack_size": 128}
    path.write_text(yaml.safe_dump(tree))
    config, context = context_for(path)
    with pytest.raises(UserError, match="was packed to 64 tokens, and data.pack_size is 128"):
        run(config, context)


def test_experts_stay_in_16_bits_and_what_does_not_fit_is_refused(base):
    """By bitsandbytes' rule, from the names alone: no weight is read."""
    import torch
    from transformers import AutoModelForCausalLM

    from nemotron_recipes.worker.trl import fourbit

    model = AutoModelForCausalLM.from_pretrained(base, device_map="meta", dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    split = fourbit.expected(model)
    experts = sum(p.numel() * 2 for name, p in model.named_parameters() if "experts" in name and "shared" not in name)
    linear = sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and not name.endswith(("lm_head", "out_proj"))
    )
    assert split.other > experts > 0
    assert split.quantised == pytest.approx(linear * 0.516, rel=0.01)
    fourbit.require_room(split, device=sum(split))
    with pytest.raises(UserError, match="stay in 16 bits"):
        fourbit.require_room(split, device=sum(split) - 1)


def test_the_merge_after_four_bits_is_of_the_whole_base(tmp_path, base):
    """The base as it is published, with the adapters added: the same as merging in place, when that has 16 bits."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = SimpleNamespace(model=SimpleNamespace(dtype="bfloat16", attn_implementation="sdpa"))
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapted = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "in_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    Plain().write_merged(None, base, tmp_path / "adapter", settings, tmp_path / "merged")
    merged, wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), adapted.merge_and_unload()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    for (name, one), other in zip(merged.named_parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-2), name
