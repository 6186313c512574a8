"""The one schema of a stage config. Everything that composes must validate against it, whatever layer it came from.

Keys follow Megatron-Bridge's section names where the field has one (`train.train_iters`, `optimizer.lr`,
`checkpoint.load`). Strict types: no text becomes a number here. `run` and `backend.native` are checked against
the chosen executor's and backend's own fields (planning/validate.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A closed section: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Source(Section):
    """One data source. `path`: a reference (docs/contracts.md); `split` pins all its rows to one split."""

    path: str
    name: str | None = None
    split: Literal["train", "validation", "test"] | None = None  # where its rows go; null: by hash
    weight: Annotated[float, Field(gt=0)] = 1.0  # share in the blend, relative to its size
    subset: str | None = None  # hub data sets only: the configuration name
    hub_split: str = "train"  # hub data sets only: the split that is read
    rows: Positive | None = None  # sample: how many rows to generate; else: read at most this many
    seed: int = 0  # sample: only


class Columns(Section):
    """Names of the fields in the rows, where they are not the usual ones. null: the usual names are looked for."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    expected_answer: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None
    label: str | None = None


class Splits(Section):
    """Shares of rows without a predefined split; a hash of the row's content decides, so that rows stay put."""

    train: Fraction = 0.98
    validation: Fraction = 0.01
    test: Fraction = 0.01


class DataPrep(Section):
    """How rows become training data."""

    sources: Annotated[list[Source], Field(min_length=1)]
    columns: Columns = Columns()
    splits: Splits = Splits()
    sample: Positive | None = None  # at most this many rows of each source
    pack_size: Annotated[int, Field(ge=8)] = 4096  # tokens
    overlong: Literal["drop", "truncate"] = "drop"  # rows longer than pack_size; counted either way
    format: Literal["native", "megatron_npy"] = "native"
    on_bad_row: Literal["count", "fail"] = "count"
    tokenizer: str  # a reference
    chat_template: str = "nemotron3"  # nemotron3, or a path to a .jinja file
    thinking: bool = True  # the generation prompt opens a reasoning block
    answer_pattern: str | None = None  # regex with one group that finds the final answer in a reference answer


class DataInput(Section):
    """Prepared data that a training stage reads."""

    path: str  # a reference


class Model(Section):
    """Base model. `path`: a reference; `arch` shapes the tiny model that the project makes (path: tiny)."""

    path: str
    tokenizer: str | None = None  # a reference; null: the model's own
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    arch: dict[str, Any] = {}


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
    """`load`: a checkpoint root or an iter_NNNNNNN folder to continue from; a missing one is an error."""

    save_interval: Positive | None = None  # steps; null: only the end
    keep: Positive = 2  # newest whole checkpoints kept
    load: str | None = None


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


class Grpo(Section):
    """GRPO (arXiv 2402.03300). `kl_beta` 0 keeps no reference model."""

    num_generations: Annotated[int, Field(ge=2)] = 8  # completions per prompt (group size)
    max_completion_length: Positive = 256  # tokens
    temperature: Annotated[float, Field(gt=0)] = 1.0
    kl_beta: Annotated[float, Field(ge=0)] = 0.0
    rewards: Annotated[list[str], Field(min_length=1)] = ["exact_match"]


class Evaluation(Section):
    """Held-out measurement before and after training, on the data's test split."""

    rows: Annotated[int, Field(ge=0)] = 200  # 0: none
    max_new_tokens: Positive = 256


class Backend(Section):
    """`native`: keys of the backend's own config, for what the envelope has no name for."""

    name: str
    native: dict[str, Any] = {}


class CodePolicy(Section):
    """What is asked of the code that runs."""

    require_clean: bool = False  # refuse to run with uncommitted changes in the checkout


class Outputs(Section):
    """Names under which results are registered in the store."""

    data: str | None = None
    model: str | None = None


class DataPrepConfig(Section):
    """A stage that prepares data."""

    kind: Literal["data_prep"]
    method: Literal["sft", "dpo", "kto", "rl"]
    data: DataPrep
    outputs: Outputs
    code: CodePolicy = CodePolicy()
    run: dict[str, Any] = {}


class TrainConfig(Section):
    """A stage that trains."""

    kind: Literal["train"]
    method: Literal["sft", "dpo", "kto", "grpo"]
    model: Model
    data: DataInput
    train: Train
    optimizer: Optimizer
    scheduler: Scheduler = Scheduler()
    checkpoint: Checkpoint = Checkpoint()
    peft: Lora | None = None
    dpo: Dpo | None = None
    kto: Kto | None = None
    grpo: Grpo | None = None
    evaluation: Evaluation = Evaluation()
    backend: Backend
    outputs: Outputs
    code: CodePolicy = CodePolicy()
    run: dict[str, Any] = {}


class PipeStage(Section):
    """One step of a pipe: the words and the config of a stage of the same family."""

    stage: str  # "data prep sft", "sft"
    config: str


class PipeConfig(Section):
    """Stages in order. A stage's input that names an earlier stage's output waits for it.

    Where they run is said by their own configs, the profile and `run.*` on the command line.
    """

    kind: Literal["pipe"]
    stages: Annotated[list[PipeStage], Field(min_length=1)]


KINDS: dict[str, type[Section]] = {"data_prep": DataPrepConfig, "train": TrainConfig, "pipe": PipeConfig}

# Config keys that hold references, per kind: (dotted key, artifact kind). `[]` stands for every element.
REFERENCES: dict[str, tuple[tuple[str, str], ...]] = {
    "data_prep": (
        ("data.tokenizer", "tokenizer"),
        ("data.sources[].path", "data"),
        ("data.chat_template", "template"),
    ),
    "train": (
        ("model.path", "model"),
        ("model.tokenizer", "tokenizer"),
        ("data.path", "data"),
        ("checkpoint.load", "checkpoint"),
    ),
}
