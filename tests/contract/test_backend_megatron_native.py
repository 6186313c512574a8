"""The megatron_bridge backend against the real ConfigContainer.

The package can't be installed everywhere (gigabytes, half of them CUDA): what it answered is checked in, with the
question. The long test asks the real package again.
"""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from nemotron_recipes.backends import schemas
from nemotron_recipes.backends.megatron_bridge import NATIVE_FILE, MegatronBridgeBackend
from nemotron_recipes.config.schema import TrainConfig
from nemotron_recipes.spec import StageSpec
from tests.helpers import real_megatron

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).parent / "records" / "megatron_bridge-0.3.1.json"
RUN = {"id": "r", "stage": "s", "dir": "/r/s", "store": "/store", "fingerprint": "f"}
# No value is that of the recipe, so that a value that doesn't arrive is seen.
TREE = {
    "kind": "train",
    "method": "sft",
    "model": {"path": "ORG/NAME"},
    "data": {"path": "artifact:rows", "pack_size": 6144},
    "train": {
        "train_iters": 70,
        "global_batch_size": 96,
        "micro_batch_size": 3,
        "seed": 17,
        "log_interval": 3,
        "eval_interval": 11,
    },
    "optimizer": {
        "lr": 3e-4,
        "weight_decay": 0.03,
        "adam_beta1": 0.8,
        "adam_beta2": 0.7,
        "adam_eps": 3e-7,
        "clip_grad": 0.3,
    },
    "scheduler": {"lr_decay_style": "linear", "lr_warmup_iters": 4},
    "checkpoint": {"save_interval": 13, "keep": 5, "pretrained_checkpoint": "/base"},
    "parallel": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "context_parallel_size": 2,
        "expert_model_parallel_size": 16,
        "expert_tensor_parallel_size": 2,
        "sequence_parallel": True,
    },
    "peft": {"dim": 24, "alpha": 48, "dropout": 0.07, "target_modules": ["linear_qkv", "in_proj"]},
    "evaluation": {"rows": 0},
    "backend": {
        "name": "megatron_bridge",
        "native": {
            "recipe": "nemotron_3_nano_peft_config",
            "model": {"recompute_granularity": "full", "moe_token_dispatcher_type": "alltoall"},
            "optimizer": {"min_lr": 1e-6},
            "ddp": {"overlap_param_gather": False},
        },
    },
    "outputs": {"checkpoint": "made"},
}


def question():
    """What the worker is told for `TREE`."""
    config = TrainConfig.model_validate(copy.deepcopy(TREE)).model_dump()
    backend = MegatronBridgeBackend()
    # No run could use packs like this; here they are values that must arrive.
    assert {p.fix for p in backend.check(config, nproc=128)} == {
        "train.micro_batch_size=1",
        "parallel.context_parallel_size=1",
    }
    launch = backend.describe(StageSpec(config, {}, (), RUN, nproc=128))
    worker = yaml.safe_load(launch.files["train.yaml"])
    told = {name: worker[name] for name in ("recipe", "method", "pack_size")}
    return config, {**told, "native": yaml.safe_load(launch.files[NATIVE_FILE])}


def ask(told, python, stubs):
    done = subprocess.run(
        [python, ROOT / "tools" / "schemas" / "readback_megatron_bridge.py", ",".join(stubs)],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_record_answers_the_question_of_today(pytestconfig):
    _, told = question()
    assert json.loads(RECORD.read_text())["question"] == told, "run the long test with --update-golden"


def test_every_value_of_the_table_arrives():
    """Envelope -> megatron.yaml -> the real ConfigContainer, and back through the table."""
    config, _ = question()
    answer = json.loads(RECORD.read_text())["answer"]
    recipe = schemas.load(real_megatron.VERSION).content["recipes"]["nemotron_3_nano_peft_config"]["sections"]
    converted = {"optimizer.name": "adam", "model.dtype": "bf16_mixed"}
    same_as_recipe = {"optimizer.optimizer", "mixed_precision"}
    for key, native in MegatronBridgeBackend().table("sft").items():
        section, _, name = key.partition(".")
        wanted = converted.get(key, config[section][name])
        assert answer[native] == wanted and type(answer[native]) is type(wanted), key
        if native not in same_as_recipe:
            head, _, field = native.partition(".")
            assert recipe[head]["values"].get(field) != wanted, f"{key}: the test can't tell it from the recipe's"


def test_native_keys_paths_and_promises_arrive():
    answer = json.loads(RECORD.read_text())["answer"]
    assert answer["model.recompute_granularity"] == "full" and answer["ddp.overlap_param_gather"] is False
    assert answer["optimizer.min_lr"] == 1e-6 and answer["model.moe_token_dispatcher_type"] == "alltoall"
    assert answer["checkpoint.exit_on_missing_checkpoint"] is True and answer["train.exit_signal_handler"] is True
    assert (answer["checkpoint.load"], answer["checkpoint.ckpt_step"]) == ("/run", 7)
    assert (answer["checkpoint.pretrained_checkpoint"], answer["checkpoint.save"]) == ("/base", "/r/s/checkpoints")
    assert answer["tokenizer.tokenizer_model"] == "ORG/NAME"
    assert answer["dataset"] == "FinetuningDatasetConfig" and answer["dataset.seq_length"] == 6144
    assert answer["dataset.packed_sequence_specs.packed_sequence_size"] == 6144
    assert answer["dataset.packed_sequence_specs.pad_seq_to_mult"] == 4  # lcm(2 CP, CP TP)
    assert answer["dataset.packed_sequence_specs.packed_train_data_path"] == "training.npy"


@pytest.mark.long
def test_the_record_and_the_schema_are_the_real_packages(pytestconfig):
    python = real_megatron.python(checked=True)
    _, told = question()
    stubs = schemas.load(real_megatron.VERSION).content["stubs"]
    found = {"question": told, "answer": ask(told, python, stubs)}
    if pytestconfig.getoption("--update-golden"):
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert json.loads(RECORD.read_text()) == found
    wrong = copy.deepcopy(told)
    wrong["native"]["train"]["train_itres"] = 4
    with pytest.raises(AssertionError, match="train_itres"):
        ask(wrong, python, stubs)
