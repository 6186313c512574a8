"""The one schema of a stage config. Everything that composes must validate against it, whatever layer it came from.

Keys follow Megatron-Bridge's section names where the field has one (`train.train_iters`, `optimizer.lr`,
`checkpoint.load`). Strict types: no text becomes a number here. `run` and `backend.native` are checked against
the chosen executor's and backend's own fields (planning/validate.py).
"""

from __future__ import annotations

import types
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from nemotron_recipes.data.settings import Settings

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A closed section: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


@cache
def derived(declared: type) -> type[Section]:
    """The closed section with a stdlib dataclass's fields, types, rules, defaults and docstring."""
    hints = get_type_hints(declared, include_extras=True)
    found: dict[str, Any] = {}
    for field in fields(declared):
        default: Any = ... if field.default is MISSING else field.default
        if is_dataclass(default) and not isinstance(default, type):
            default = derived(type(default)).model_validate(asdict(default))
        found[field.name] = (_annotation(hints[field.name]), default)
    return create_model(declared.__name__, __base__=Section, __doc__=declared.__doc__, **found)


def _annotation(hint: Any) -> Any:
    """The same type for pydantic: nested dataclasses as sections, `Rule`s as its own constraints."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        plain, *rules = inner
        limits: dict[str, Any] = {"allow_inf_nan": False} if plain is float else {}
        for rule in rules:
            limits |= {name: value for name, value in vars(rule).items() if value is not None}
        return Annotated[_annotation(plain), Field(**limits)]
    if origin in (Union, types.UnionType):
        return Union[tuple(_annotation(option) for option in inner)]  # noqa: UP007  built at run time
    if origin is list:
        return list[_annotation(inner[0])]  # type: ignore[misc]
    return derived(hint) if isinstance(hint, type) and is_dataclass(hint) else hint


DataPrep = derived(Settings)


class DataInput(Section):
    """Prepared data that a training stage reads."""

    path: str  # a reference
    pack_size: Positive | None = None  # tokens of a pack, for backends that size themselves by it; as data prep had it


class Model(Section):
    """Base model. `path`: a reference; `arch` shapes the tiny model that the project makes (path: tiny)."""

    path: str
    tokenizer: str | None = None  # a reference; null: the model's own
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    load_in_4bit: bool = False  # NF4 by bitsandbytes while adapters are trained (QLoRA, arXiv 2305.14314)
    arch: dict[str, Any] = {}


class Parallel(Section):
    """How a model and its batches are shared out over the processes; in Megatron's words."""

    tensor_model_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    context_parallel_size: Positive = 1
    expert_model_parallel_size: Positive = 1
    expert_tensor_parallel_size: Positive = 1
    sequence_parallel: bool = False


class Train(Section):
    """Length and batch. A batch counts packs for SFT, pairs for DPO, examples for KTO, completions for GRPO."""

    train_iters: Positive
    global_batch_size: Positive
    micro_batch_size: Positive = 1
    seed: int = 0
    log_interval: Positive = 1  # steps
    eval_interval: Positive | None = None  # steps between validation losses; null: only at the end
    resume: bool = False  # continue the newest unfinished run with this fingerprint


class Optimizer(Section):
    """AdamW's settings."""

    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad: Annotated[float, Field(ge=0)] = 1.0  # largest gradient norm; 0: no clipping


class Scheduler(Section):
    """Learning rate over time."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_iters: Annotated[int, Field(ge=0)] = 0


class Checkpoint(Section):
    """`load`: a checkpoint root or an iter_NNNNNNN folder to continue from; a missing one is an error.

    `pretrained_checkpoint`: the base model in the backend's own format, where that is not a Hugging Face folder.
    """

    save_interval: Positive | None = None  # steps; null: only the end
    keep: Positive = 2  # newest whole checkpoints kept
    load: str | None = None
    pretrained_checkpoint: str | None = None


class Lora(Section):
    """LoRA (arXiv 2106.09685). `target_parameters` reaches fused expert weights."""

    dim: Positive = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj"]
    target_parameters: list[str] = []


class Dpo(Section):
    """DPO (arXiv 2305.18290)."""

    beta: Annotated[float, Field(gt=0)] = 0.1


class Kto(Section):
    """KTO (arXiv 2402.01306)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0


class RewardSettings(Section):
    """What rewards need to know beside the row."""

    format_pattern: str | None = None  # format: a regular expression that the whole completion must match
    code_seconds: Annotated[float, Field(gt=0)] = 10.0  # code_tests: for one program
    code_memory_mib: Positive = 1024  # code_tests: of one program
    judges: str | None = None  # judges: the file that names them (docs/rewards.md)


class Grpo(Section):
    """GRPO (arXiv 2402.03300). `kl_beta` 0 keeps no reference model."""

    num_generations: Annotated[int, Field(ge=2)] = 8  # completions per prompt (group size)
    max_completion_length: Positive = 256  # tokens
    temperature: Annotated[float, Field(gt=0)] = 1.0
    kl_beta: Annotated[float, Field(ge=0)] = 0.0
    rewards: Annotated[list[str], Field(min_length=1)] = ["exact_match"]
    reward_weights: list[float] | None = None  # one a reward; null: 1 each
    reward_settings: RewardSettings = RewardSettings()


class Evaluation(Section):
    """Held-out measurement before and after training, on the data's test split."""

    rows: Annotated[int, Field(ge=0)] = 200  # 0: none
    max_new_tokens: Positive = 256


class Backend(Section):
    """`native`: keys of the backend's own config, for what the envelope has no name for."""

    name: str
    image: str | None = None  # what the recipe was published with; a profile's container_image comes first
    native: dict[str, Any] = {}


class Planning(Section):
    """What a plan is refused for."""

    allow_oom_risk: bool = False  # run it although it can't fit into the GPUs' memory
    requires_smoke: Positive | None = None  # steps of a smoke run, under the memory watchdog, that must come before


class CodePolicy(Section):
    """What is asked of the code that runs."""

    require_clean: bool = False  # refuse to run with uncommitted changes in the checkout


class Outputs(Section):
    """Names under which results are registered in the store."""

    data: str | None = None
    model: str | None = None
    checkpoint: str | None = None
    adapter: str | None = None


class DataPrepConfig(Section):
    """A stage that prepares data."""

    kind: Literal["data_prep"]
    method: Literal["sft", "dpo", "kto", "rl", "pretrain"]
    data: DataPrep  # type: ignore[valid-type]
    outputs: Outputs
    code: CodePolicy = CodePolicy()
    run: dict[str, Any] = {}


class TrainConfig(Section):
    """A stage that trains."""

    kind: Literal["train"]
    method: Literal["pretrain", "sft", "dpo", "kto", "grpo"]
    model: Model
    data: DataInput
    train: Train
    optimizer: Optimizer
    scheduler: Scheduler = Scheduler()
    checkpoint: Checkpoint = Checkpoint()
    parallel: Parallel | None = None
    peft: Lora | None = None
    dpo: Dpo | None = None
    kto: Kto | None = None
    grpo: Grpo | None = None
    evaluation: Evaluation = Evaluation()
    backend: Backend
    outputs: Outputs
    code: CodePolicy = CodePolicy()
    plan: Planning = Planning()
    run: dict[str, Any] = {}


class Conversion(Section):
    """Checkpoints in Megatron's format. `path`: what is converted; `base`: what the adapters in it were trained on."""

    path: str | None = None  # a reference
    base: str | None = None  # a reference


class ConvertConfig(Section):
    """A stage that brings weights from one format into another. `model.path`: the Hugging Face model they belong to.

    `parallel`: how the model is shared out over the processes of `run`; null: one process holds all of it.
    """

    kind: Literal["convert"]
    method: Literal["import", "merge", "export"]
    model: Model
    checkpoint: Conversion = Conversion()
    parallel: Parallel | None = None
    backend: Backend
    outputs: Outputs
    code: CodePolicy = CodePolicy()
    run: dict[str, Any] = {}


class PipeStage(Section):
    """One step of a pipe: the words and the config of a stage, of the same family unless another is named."""

    family: str | None = None
    stage: str  # "data prep sft", "sft"
    config: str


class PipeConfig(Section):
    """Stages in order. A stage's input that names an earlier stage's output waits for it.

    Where they run is said by their own configs, the profile and `run.*` on the command line.
    """

    kind: Literal["pipe"]
    stages: Annotated[list[PipeStage], Field(min_length=1)]


KINDS: dict[str, type[Section]] = {
    "data_prep": DataPrepConfig,
    "train": TrainConfig,
    "convert": ConvertConfig,
    "pipe": PipeConfig,
}

# Config keys that hold references, per kind: (dotted key, artifact kind). `[]` stands for every element.
REFERENCES: dict[str, tuple[tuple[str, str], ...]] = {
    "data_prep": (
        ("data.tokenizer", "tokenizer"),
        ("data.sources[].path", "data"),
        ("data.chat_template", "template"),
        ("data.gates.contamination.files[]", "data"),
    ),
    "train": (
        ("model.path", "model"),
        ("model.tokenizer", "tokenizer"),
        ("data.path", "data"),
        ("grpo.reward_settings.judges", "judges"),
        ("checkpoint.load", "checkpoint"),
        ("checkpoint.pretrained_checkpoint", "checkpoint"),
    ),
    "convert": (
        ("model.path", "model"),
        ("checkpoint.path", "checkpoint"),
        ("checkpoint.base", "checkpoint"),
    ),
}
