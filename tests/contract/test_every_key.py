"""Every key of the envelope on every backend: it reaches what is launched, or setting it is an error."""

import copy

import pytest

from nemotron_recipes.backends import REGISTRY, get_backend
from nemotron_recipes.config.schema import KINDS, REFERENCES, Section
from tests.contract.test_backend_contract import cases, config_for, launch_for

# Another value than the one that configs here have, for every key.
OTHER = {
    "train.train_iters": 9,
    "train.global_batch_size": 32,
    "train.micro_batch_size": 4,
    "train.seed": 11,
    "train.log_interval": 3,
    "train.eval_interval": 2,
    "optimizer.lr": 3e-4,
    "optimizer.weight_decay": 0.25,
    "optimizer.adam_beta1": 0.8,
    "optimizer.adam_beta2": 0.91,
    "optimizer.adam_eps": 1e-7,
    "optimizer.clip_grad": 0.5,
    "scheduler.lr_decay_style": "linear",
    "scheduler.lr_warmup_iters": 3,
    "checkpoint.save_interval": 3,
    "checkpoint.keep": 5,
    "parallel.tensor_model_parallel_size": 2,
    "parallel.pipeline_model_parallel_size": 2,
    "parallel.context_parallel_size": 2,
    "parallel.expert_model_parallel_size": 2,
    "parallel.expert_tensor_parallel_size": 2,
    "parallel.sequence_parallel": True,
    "peft.dim": 4,
    "peft.alpha": 5,
    "peft.dropout": 0.25,
    "peft.target_modules": ["k_proj"],
    "peft.target_parameters": ["mixer.experts.up_proj"],
    "dpo.beta": 0.3,
    "kto.beta": 0.3,
    "kto.desirable_weight": 2.0,
    "kto.undesirable_weight": 2.0,
    "grpo.num_generations": 4,
    "grpo.max_completion_length": 33,
    "grpo.temperature": 0.7,
    "grpo.kl_beta": 0.2,
    "grpo.rewards": ["format"],
    "grpo.reward_weights": [2.0],
    "grpo.reward_settings.format_pattern": "x",
    "grpo.reward_settings.code_seconds": 3.0,
    "grpo.reward_settings.code_memory_mib": 77,
    "evaluation.rows": 7,
    "evaluation.max_new_tokens": 9,
    "model.dtype": "float32",
    "model.attn_implementation": "eager",
    "model.load_in_4bit": True,
    "model.arch": {"hidden_size": 8},
    "data.pack_size": 128,
}
# Which way a run goes, not what its backend does; and keys that one value alone is possible for.
ELSEWHERE = {"kind", "method", "train.resume", "optimizer.name"}
ELSEWHERE_BELOW = ("plan.", "code.", "outputs.", "backend.", "run")
# References become pinned inputs of the worker; those that not every worker reads.
READS = {
    "model.tokenizer": {"trl", "unsloth", "megatron_bridge", "nemo_rl"},
    "checkpoint.pretrained_checkpoint": {"megatron_bridge"},
    "grpo.reward_settings.judges": {"trl", "unsloth"},
}


def section_in(annotation):
    """The model in an annotation such as `Lora | None`; None: it is no section."""
    parts = (annotation, *getattr(annotation, "__args__", ()))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)


def keys_of(model: type[Section], prefix: str = ""):
    for name, field in model.model_fields.items():
        below = section_in(field.annotation)
        yield from keys_of(below, f"{prefix}{name}.") if below else [prefix + name]


def with_value(config, key, value):
    changed = copy.deepcopy(config)
    *path, last = key.split(".")
    node = changed
    for part in path:
        node = node[part]
    node[last] = value
    return changed


def test_every_key_is_looked_at():
    said = set(keys_of(KINDS["train"]))
    references = {key for key, _ in REFERENCES["train"]}
    elsewhere = {key for key in said if key in ELSEWHERE or key.startswith(ELSEWHERE_BELOW)}
    assert said == OTHER.keys() | references | elsewhere
    assert READS.keys() <= references


@pytest.mark.parametrize(("name", "method"), cases("train"))
def test_none_is_dropped(name, method):
    backend, dropped = get_backend(name), []
    unread, config = backend.unread(method), config_for(name, method)
    assert unread.keys() <= {*OTHER, *READS}
    for key, value in OTHER.items():
        section = key.partition(".")[0]
        if section in ("dpo", "kto", "grpo") and section != method:
            continue  # refused whole, whatever the backend (test_native_schemas)
        start = copy.deepcopy(config)
        if start[section] is None:
            defaults = section_in(KINDS["train"].model_fields[section].annotation)
            start[section] = defaults.model_validate({}).model_dump()
        changed = with_value(start, key, value)
        before, after = (launch_for(name, method, tree, nproc=1) for tree in (start, changed))
        arrives = before.files != after.files
        words = [str(p) for p in backend.check(changed, nproc=1)]
        refused = any(key in said or section in said for said in words)
        if key in unread and arrives:
            dropped.append(f"{key} is said to be unread, and isn't")
        if key not in unread and not arrives and not refused:
            dropped.append(key)
    assert dropped == []


@pytest.mark.parametrize(("name", "method"), cases("train"))
def test_a_reference_that_the_worker_does_not_read_is_refused(name, method):
    backend, config = get_backend(name), config_for(name, method)
    for key, readers in READS.items():
        if key.startswith("grpo.") and method != "grpo":
            continue
        said = [str(p) for p in backend.check(with_value(config, key, "artifact:other"), nproc=1)]
        refused = key in backend.unread(method) or any(key in words for words in said)
        assert refused == (name not in readers) or key.endswith("judges"), (key, said)


@pytest.mark.parametrize(("name", "method"), cases("convert"))
def test_nor_in_a_conversion(name, method):
    backend, config = get_backend(name), config_for(name, method)
    for key in ("model.dtype", "model.attn_implementation", "model.load_in_4bit", "model.arch"):
        changed = with_value(config, key, OTHER[key])
        arrives = launch_for(name, method, changed).files != launch_for(name, method, config).files
        refused = any(key in str(p) for p in backend.check(changed, nproc=1))
        assert arrives or refused or key in backend.unread(method), key
    assert "model.tokenizer" in backend.unread(method)


def test_every_backend_is_looked_at():
    assert {kind for name in REGISTRY for kind in get_backend(name).kinds} == {"train", "convert", "data_prep"}
