"""The checked-in schemas of the NVIDIA packages, and what a plan makes of a wrong key or value."""

import hashlib
from pathlib import Path

import pytest

from nemotron_recipes.backends import REGISTRY, schemas
from nemotron_recipes.config.catalog import Catalog, package_root
from nemotron_recipes.config.compose import compose
from nemotron_recipes.planning.validate import validate

ROOT = Path(__file__).parents[2]
CATALOG = Catalog((package_root(),))
NANO = "recipe/nano3/sft/default"
LORA = "recipe/nano3/sft/lora"
RL = "recipe/nano3/rl/nemo-rl"
GYM = "recipe/nano3/rl/nemo-gym"
DPO = "recipe/nano3/dpo/nemo-rl"
ULTRA = "recipe/ultra3/lora/h100"


def test_what_was_read_from_the_packages():
    bridge = schemas.load("megatron_bridge-0.3.1")
    assert bridge.fields["train.train_iters"] == [{"default": None, "type": "None | int"}]
    assert bridge.fields["checkpoint.exit_on_missing_checkpoint"][0]["default"] is False
    assert "nemotron_3_nano_sft_config" in bridge.recipes
    assert bridge.content["with"]["megatron-core"] == "0.16.1"
    assert all("." not in stub or stub.startswith("megatron.") for stub in bridge.content["stubs"])
    automodel = schemas.load("automodel-0.5.0")
    assert automodel.fields["step_scheduler.ckpt_every_steps"] == [{"default": 100, "type": "None | int"}]
    assert len(automodel.content["with"]["commit"]) == 40


@pytest.mark.parametrize(
    ("path", "override", "message"),
    [
        (NANO, "+backend.native.train.train_itres=4", "did you mean 'backend.native.train.train_iters'?"),
        (NANO, "+backend.native.model.recompute_granularty=full", "did you mean 'backend.native.model.recompute_gran"),
        (NANO, "+backend.native.optimizer.lr=1e-5", "set optimizer.lr instead"),
        (NANO, "+backend.native.mixed_precision=bf16_mixed", "set model.dtype instead"),
        (NANO, "+backend.native.mixed_precision.grad_reduce_fp32=true", "native.mixed_precision.grad_reduce_in_fp32'?"),
        (NANO, "+backend.native.rng.seed=1", "set train.seed instead"),
        (NANO, "+train.train_itres=4", "did you mean 'train.train_iters'?"),
        (
            ULTRA,
            "+backend.native.step_scheduler.ckpt_every_step=4",
            "'backend.native.step_scheduler.ckpt_every_steps'?",
        ),
        (ULTRA, "+backend.native.distributed.pipeline.pp_schedul=1f1b", "native.distributed.pipeline.pp_schedule'?"),
        (ULTRA, "+backend.native.distributed.moe.reshard_after_forwrd=true", "distributed.moe.reshard_after_forward'?"),
        (ULTRA, "+backend.native.optimizer.lr=1e-5", "set optimizer.lr instead"),
        (RL, "+backend.native.env.math.num_worker=3", "did you mean 'backend.native.env.math.num_workers'?"),
        (RL, "+backend.native.env.maths.num_workers=3", "did you mean 'backend.native.env.math.num_workers'?"),
        (DPO, "+backend.native.policy.optimizer.kwargs.amsgrd=true", "policy.optimizer.kwargs.amsgrad'?"),
        (RL, "+backend.native.policy.generation.vllm_cfg.gpu_memory_utilisation=.5", "gpu_memory_utilization'?"),
        (RL, "+backend.native.grpo.max_num_step=4", "did you mean 'backend.native.grpo.max_num_steps'?"),
        (RL, "+backend.native.policy.megatron_cfg.optimizer.lr=1", "set optimizer.lr instead"),
        (RL, "+backend.native.loss_fn.ratio_clip_mx=0.3", "did you mean 'backend.native.loss_fn.ratio_clip_max'?"),
        (NANO, "+dpo={beta: 0.1}", "the section 'dpo' means nothing for method sft"),
        (DPO, "dpo=null", "method dpo needs its section 'dpo'"),
        (RL, "grpo=null", "method grpo needs its section 'grpo'"),
        (RL, "+grpo.reward_weights=[1.0]", "backend nemo_rl has nothing for 'grpo.reward_weights'"),
        (RL, "+train.log_interval=5", "every step is logged"),
        (NANO, "model.attn_implementation=eager", "backend.native.model.attention_backend"),
        ("recipe/convert/import/nano3", "+model.load_in_4bit=true", "weights are converted as they are"),
        (ULTRA, "+backend.native.optimzer.lr=1e-5", "unknown key 'backend.native.optimzer.lr' of automodel"),
    ],
)
def test_a_typo_or_a_second_name_fails_in_the_plan(path, override, message):
    checked, problems = validate(compose(CATALOG, path, (override,)), path)
    assert checked == {}
    assert len(problems) == 1 and message in str(problems[0]), problems


def problems_of(path, *overrides, nproc=16):
    from nemotron_recipes.backends import get_backend

    checked, problems = validate(compose(CATALOG, path, overrides), path)
    assert problems == []
    return [str(problem) for problem in get_backend(checked["backend"]["name"]).check(checked, nproc)]


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        (NANO, ("backend.native.recipe=nemotron_3_nano_stf_config",), "did you mean 'nemotron_3_nano_sft_config'"),
        (NANO, ("~backend.native.recipe",), "must name a recipe"),
        (NANO, ("+backend.native.train.manual_gc=often",), "'backend.native.train.manual_gc' should be bool"),
        (NANO, ("backend.native.model.recompute_granularity=7",), "should be"),
        (NANO, ("+backend.native.checkpoint.save=/x",), "can't be set: everything goes to the run folder"),
        (
            NANO,
            ("+backend.native.ddp.grad_reduce_in_fp32=false",),
            "use backend.native.mixed_precision.grad_reduce_in_",
        ),
        (NANO, ("model.dtype=float32", "+backend.native.mixed_precision.fp8=e4m3"), "has no mixed precision to set"),
        (NANO, ("data.pack_size=null",), "data.pack_size=4096"),
        (NANO, ("checkpoint.pretrained_checkpoint=null",), "none is named"),
        (NANO, ("evaluation.rows=5",), "evaluation.rows=0"),
        (LORA, ("peft.target_modules=[q_proj]",), "Megatron calls it linear_qkv"),
        (LORA, ("peft.target_modules=[linear_qvk]",), "did you mean 'linear_qkv'"),
        (LORA, ("peft=null",), "nemotron_3_nano_peft_config trains adapters, and none are asked for"),
        (NANO, ("+peft={dim: 8, target_modules: [linear_qkv]}",), "sft_config has no section 'peft' to change"),
        (NANO, ("+backend.native.comm_overlap.tp_comm_overlap=true",), "a recipe that has one: nemotron_3_nano_pretr"),
        (NANO, ("+backend.native.model.encoder_num_layers=3",), "Nemotron3NanoProvider of nemotron_3_nano_sft_config"),
        (NANO, ("+backend.native.dataset.blend=[x]",), "FinetuningDatasetConfig of nemotron_3_nano_sft_config has no"),
        (
            ULTRA,
            ("+parallel.expert_tensor_parallel_size=2", "parallel.expert_model_parallel_size=16"),
            "AutoModel shares out whole experts only",
        ),
        (
            ULTRA,
            ("+parallel.pipeline_model_parallel_size=2", "parallel.expert_model_parallel_size=16"),
            "asks how batches go through a pipeline",
        ),
        (ULTRA, ("backend.native.dataset.path_or_dataset=x",), "does not say where data.path goes"),
        (ULTRA, ("+checkpoint.pretrained_checkpoint=x",), "starts from a Hugging Face folder"),
        (RL, ("grpo.rewards=[exact_match]",), "NeMo-RL has no environment 'exact_match'"),
        (RL, ("grpo.rewards=[math,code]",), "one environment for the rows of a data set"),
        (RL, ("grpo.rewards=[nemo_gym]",), "examples/nemo_gym go together"),
        (RL, ("train.global_batch_size=520",), "counts completions"),
        (RL, ("+backend.native.data.default.prompt_fil=x",), "did you mean 'backend.native.data.default.prompt_file'?"),
        (RL, ("+backend.native.env.math.num_workers=many",), "should be int, not 'many'"),
        (RL, ("+backend.native.grpo.val_batch_size=1.5",), "should be None | int, not 1.5"),
        (GYM, ("+backend.native.env.nemo_gym.port_range_lo=5",), "native.env.nemo_gym.port_range_low'?"),
        (RL, ("backend.native.base=examples/configs/dpo.yaml",), "is not for grpo"),
        (RL, ("backend.native.base=examples/configs/grpo_math_1B_megatorn.yaml",), "did you mean"),
        (RL, ("+backend.native.checkpointing.metric_name=x",), "the newest checkpoints are kept"),
        (RL, ("+backend.native.logger.wandb_enabled=true",), "[wandb] in env.toml says where to"),
        (RL, ("+backend.native.logger.wandb.project=x",), "[wandb] in env.toml says where to"),
        (RL, ("+backend.native.logger.tensorboard_enabled=false",), "metrics.jsonl follows it"),
        (RL, ("+backend.native.policy.megatron_cfg.activation_checkpointing=often",), "should be bool"),
        (DPO, ("+parallel.pipeline_model_parallel_size=2",), "has no parallel.pipeline_model_parallel_size"),
        (ULTRA, ("+backend.native.step_scheduler.num_epochs=1",), "train.train_iters says how long"),
        (ULTRA, ("+backend.native.step_scheduler.gc_every_steps=often",), "should be None | int, not 'often'"),
    ],
)
def test_refused(path, overrides, message):
    found = problems_of(path, *overrides, nproc=32 if path == ULTRA else 16)
    assert len(found) == 1 and message in found[0], found


TARGETS = "backend.native.dataset._target_=nemo_automodel.components.datasets.llm.hellaswag"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+backend.native.model.backend.atn=te", "BackendConfig has no 'atn'"),
        ("backend.native.model.backend.attn=tee", "should be 'te', 'sdpa', 'flex', 'eager', 'tilelang', not 'tee'"),
        ("+backend.native.model.attn_implementaton=eager", "did you mean 'attn_implementation'?"),
        ("+backend.native.model.trust_remote_cod=true", "did you mean 'trust_remote_code'?"),
        ("+backend.native.model.use_liger_kernel=7", "should be bool, not 7"),
        ("+backend.native.distributed.mp_policy.param_dtyp=bfloat16", "did you mean 'param_dtype'?"),
        ("+backend.native.dataset.num_sample_limit=5", "did you mean 'num_samples_limit'?"),
        (f"{TARGETS}.HelaSwag", "hellaswag.HellaSwag'?"),
        (f"{TARGETS.replace('components', 'component')}.HellaSwag", "hellaswag.HellaSwag'?"),
        ("backend.native.dataloader.collate_fn=nemo_automodel.components.datasets.utils.default_colater", "collater'?"),
        ("+backend.native.dataloader.num_worker=4", "did you mean 'num_workers'?"),
        ("+backend.native.loss_fn.reductio=sum", "did you mean 'reduction'?"),
        ("+backend.native.optimizer.amsgrd=true", "did you mean 'amsgrad'?"),
        ("+backend.native.distributed.strategy=ddp", "layouts are those of FSDP2"),
        ("backend.native.distributed.moe.wrap_outer_model=often", "should be bool, not 'often'"),
    ],
)
def test_keyword_arguments_of_a_target(override, message):
    found = problems_of(ULTRA, override, nproc=32)
    assert len(found) == 1 and message in found[0], found


def test_what_a_target_takes_under_any_name_is_passed_on_and_said():
    from nemotron_recipes.backends import automodel

    taken = ("dataloader.group_by_length=true", "optimizer.fused=true", "dataset.num_samples_limit=5")
    overrides = [f"+backend.native.{one}" for one in (*taken, "model.rope_theta=1", "model.force_hf=true")]
    checked, _ = validate(compose(CATALOG, ULTRA, overrides), ULTRA)
    assert automodel.AutoModelBackend().check(checked, 32) == []
    _, said = automodel.notes(checked)
    assert said.startswith("backend.native.model.{rope_theta} goes to nemo_automodel.NeMoAutoModelForCausalLM.")
    own = ("backend.native.dataset._target_=mine.Rows", "+backend.native.dataset.any=1")
    assert problems_of(ULTRA, *own, nproc=32) == []


@pytest.mark.parametrize(
    "key",
    [
        "env.nemo_gym.my_server.resources_servers.x.entrypoint=a.py",
        "policy.generation.vllm_kwargs.max_num_seqs=64",
        "policy.megatron_cfg.env_vars.MY_OWN=x",
        "data.default.prompt_file=x.txt",
        "env.math.num_workers=3",
    ],
)
def test_what_only_the_user_can_know_passes(key):
    assert problems_of(GYM, f"+backend.native.{key}", nproc=256) == []


@pytest.mark.parametrize(
    ("image", "version", "note"),
    [
        ("nvcr.io/nvidia/nemo:26.04.00", "0.4.0", ""),
        ("nvcr.io#nvidia/nemo:26.06", "0.5.0", ""),
        ("nvcr.io/nvidia/nemo:26.08", "0.6.2", "holds megatron-bridge 0.6: values are checked against 0.6.2"),
        ("nvcr.io/nvidia/nemo:25.11.nemotron_3_nano", "0.3.1", "holds is unknown"),
        ("nvcr.io/nvidia/nemo:26.02.nemotron_3_super", "0.4.0", "holds is unknown"),
        ("/images/nvidia+nemo+26.04.00.sqsh", "0.4.0", ""),
        (f"/images/nvidia+nemo+26.06@sha256-{'0' * 64}.arm64.sqsh", "0.5.0", ""),
        (f"nvcr.io/nvidia/nemo:26.04.00@sha256:{'0' * 64}", "0.4.0", ""),
        ("/images/mine.sqsh", "0.6.2", "holds is unknown"),
        (None, "0.6.2", "no image is named"),
    ],
)
def test_the_image_says_which_version_or_that_nobody_knows(image, version, note):
    from nemotron_recipes.backends import megatron_bridge

    for config in (
        {"run": {}, "backend": {"image": image}},
        {"run": {"container_image": image}, "backend": {"image": image and "another"}},
    ):
        schema, said = megatron_bridge.schema_of(config)
        assert schema.version == version and (note in said if note else said == "")


def test_a_key_of_another_version_is_refused():
    image = "backend.image=nvcr.io/nvidia/nemo:"
    newer = "+backend.native.dataset.enable_offline_packing=true"
    (problem,) = problems_of(NANO, newer, f"{image}26.04.00")
    assert "megatron-bridge 0.4.0 has no 'dataset.enable_offline_packing'" in problem
    assert problems_of(NANO, newer, f"{image}26.08") == []


def test_every_file_is_what_was_read_from_its_package():
    """Those that this Python can't make anew, by their digest; `make schemas` writes both."""
    sums = dict(reversed(line.split()) for line in (ROOT / "tools" / "schemas" / "SHA256SUMS").read_text().splitlines())
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in schemas.HERE.glob("*.json")}
    assert found == sums


def test_every_schema_belongs_to_a_backend():
    from importlib import import_module

    used = {n for b in REGISTRY for n in getattr(import_module(f"nemotron_recipes.backends.{b}"), "SCHEMAS", ())}
    assert {file.stem for file in schemas.HERE.glob("*.json")} == used
