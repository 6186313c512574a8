"""Every recipe of the package composes, validates and plans, on every executor that is registered."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.config.catalog import Catalog, package_root
from nemotron_recipes.config.profiles import Environment
from nemotron_recipes.config.tree import flatten
from nemotron_recipes.executors import REGISTRY, get_executor
from nemotron_recipes.planning.plan import make_plan
from nemotron_recipes.spec import Request
from tests.helpers.executor_harness import HARNESSES

CATALOG = Catalog((package_root(),))
RECIPES = [
    (family, words, config)
    for family in CATALOG.families
    for words in CATALOG.stages(family)
    for config in CATALOG.configs(family, *words)
]
SOURCES = "data.sources=[{path: 'sample:largest_of_three', rows: 8}]"
REQUIRED = {  # what a recipe leaves to its user
    ("nano3", "pretrain"): ("data.path=blend.json",),
    ("your-model", "data", "prep", "sft"): (SOURCES, "data.tokenizer=tiny"),
    ("your-model", "lora"): ("model.path=ORG/NAME",),
    ("convert", "import", "default"): ("model.path=ORG/NAME", "outputs.checkpoint=mine"),
    ("convert", "export", "default"): (
        *("model.path=ORG/NAME", "checkpoint.path=artifact:nano3-sft-checkpoint", "outputs.model=mine"),
    ),
    ("convert", "merge", "default"): (
        *("model.path=ORG/NAME", "checkpoint.path=artifact:nano3-sft-lora-checkpoint", "outputs.model=mine"),
        "checkpoint.base=artifact:nano3-megatron",
    ),
    ("nano3", "rl", "nemo-gym"): ("data.path=gym",),
    ("nano3", "pipe", "megatron"): (f"data-prep-sft.{SOURCES}",),
}
# GPUs of the published layouts: (nodes, processes on each). An executor of one machine gets them all there.
LAYOUTS = {
    ("super3", "sft", "spark-qlora"): (1, 1),
    ("nano3", "pretrain"): (4, 8),
    ("nano3", "sft", "default"): (2, 8),
    ("nano3", "sft", "bridge-recipe"): (2, 8),
    ("nano3", "sft", "lora"): (1, 8),
    ("nano3", "pipe", "megatron"): (2, 8),
    ("nano3", "dpo", "nemo-rl"): (1, 8),
    ("nano3", "rl", "nemo-rl"): (2, 8),
    ("nano3", "rl", "nemo-gym"): (32, 8),
    ("super3", "sft", "default"): (4, 8),
    ("super3", "sft", "lora"): (2, 8),
    ("super3", "dpo"): (16, 8),
    ("super3", "rl"): (32, 8),
    ("ultra3", "lora", "gb200"): (4, 4),
    ("ultra3", "lora", "h100"): (4, 8),
}


ELSEWHERE = {("super3", ("sft",), "spark-qlora", "slurm")}  # executors that a recipe is not for
CASES = [(*recipe, executor) for recipe in RECIPES for executor in sorted(REGISTRY)]


@pytest.fixture(scope="module")
def store_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family -> a store with what earlier stages would have made. Plans only read it, so it is made once."""

    @cache
    def made(family: str) -> Path:
        store = Store(tmp_path_factory.mktemp("store"))
        for name, kind in _made(family):
            staged = store.stage(name)
            (staged.content / "content.txt").write_text("made by a test")
            store.commit(staged, kind=kind)
        return store.root

    return made


@pytest.mark.parametrize(
    ("family", "words", "config", "executor"),
    [case for case in CASES if case not in ELSEWHERE],
    ids=lambda part: str(part),
)
def test_recipe_plans_and_renders(
    family: str, words: tuple[str, ...], config: str, executor: str, tmp_path: Path, store_of: Callable[[str], Path]
) -> None:
    (tmp_path / "blend.json").write_text("{}")
    (tmp_path / "gym").mkdir()
    overrides = REQUIRED.get((family, *words)) or REQUIRED.get((family, *words, config), ())
    if words[0] == "data" and not overrides and "tiny" not in config:
        overrides = (SOURCES,)
    nodes, nproc = LAYOUTS.get((family, *words, config)) or LAYOUTS.get((family, *words)) or (1, 1)
    profile = dict(HARNESSES[executor].profile)
    if nodes * nproc > 1:
        several = {"nodes": nodes, "nproc_per_node": nproc}
        profile |= several if executor == "slurm" else {"nproc_per_node": nodes * nproc}
    smoke = 0
    if (family, config) == ("super3", "spark-qlora"):  # its bounded run, on one machine, under the memory watchdog
        profile["memory_stop_gib"], smoke = 6.0, 50
    environment = Environment(
        tmp_path,
        artifacts={"output": str(tmp_path), "store": str(store_of(family))},
        profiles={"here": profile},
    )
    request = Request(family, words, config, "run", "here", overrides, offline=True, cwd=str(tmp_path), smoke=smoke)
    plan = make_plan(request, CATALOG, environment)
    assert all(stage.launch.imports for stage in plan.stages), "what an image is tried for before anything is queued"
    rendered = get_executor(executor).render(plan)
    assert [s.name for s in rendered.stages] == [s.name for s in plan.stages]
    assert all(stage.files and stage.argv for stage in rendered.stages)


def _made(family: str) -> list[tuple[str, str]]:
    """(artifact, kind) of everything that a recipe of the family may ask for."""
    data = [f"{family}{tiny}-{name}-data" for tiny in ("", "-tiny") for name in ("sft", "dpo", "kto", "rl")]
    data += [f"{family}-spark-sft-data", f"{family}-sft-megatron-data", f"{family}-sft-megatron-2k-data"]
    models = [f"{family}-sft", f"{family}-tiny-sft", f"{family}-spark-sft", f"{family}-spark-dpo"]
    converted = ("nano3", "super3", "r1-qwen3-8b") if family == "convert" else (family,)
    models += [f"{name}-sft" for name in converted if family == "convert"]
    kinds = ("megatron", *(f"{stage}-checkpoint" for stage in ("sft", "sft-lora", "lora", "dpo", "rl")))
    checkpoints = [f"{name}-{kind}" for name in converted for kind in kinds]
    return [*((n, "data") for n in data), *((n, "model") for n in models), *((n, "checkpoint") for n in checkpoints)]


def test_r1_under_unsloth_and_on_megatron_is_one_training(tmp_path: Path, store_of: Callable[[str], Path]) -> None:
    """The same rows and values; what differs is how each says it; both ways end in a merged model."""
    artifacts = {"output": str(tmp_path), "store": str(store_of("r1-qwen3-8b"))}
    environment = Environment(tmp_path, artifacts=artifacts, profiles={})

    def config_of(family: str, words: tuple[str, ...], config: str, *overrides: str) -> dict[str, Any]:
        request = Request(family, words, config, overrides=overrides, offline=True, cwd=str(tmp_path))
        (stage,) = make_plan(request, CATALOG, environment).stages
        return flatten({key: value for key, value in stage.config.items() if key != "run"})

    def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        return {key: (one.get(key), other.get(key)) for key in {*one, *other} if one.get(key) != other.get(key)}

    lora = ("r1-qwen3-8b", ("lora",))
    unsloth, megatron = config_of(*lora, "unsloth"), config_of(*lora, "megatron")
    found = differing(unsloth, megatron)
    said_differently = {
        "data.path": ("artifact:r1-qwen3-8b-sft-data", "artifact:r1-qwen3-8b-sft-megatron-data"),
        "peft.target_modules": ([f"*.{name}_proj" for name in "qkvo"], ["linear_qkv", "linear_proj"]),
        "train.micro_batch_size": (2, 1),  # 8 or 16 accumulated: one global batch
        "outputs.model": ("r1-qwen3-8b-merged", None),
        "outputs.checkpoint": (None, "r1-qwen3-8b-lora-checkpoint"),
    }
    assert {key: value for key, value in found.items() if key in said_differently} == said_differently
    of_the_backend = ("backend.", "parallel", "evaluation.", "checkpoint.pretrained_checkpoint")
    assert [key for key in found if key not in said_differently and not key.startswith(of_the_backend)] == []
    assert unsloth["model.dtype"] == "bfloat16"
    rows = (("data", "prep", "sft"), SOURCES)
    one, other = (config_of("r1-qwen3-8b", rows[0], name, rows[1]) for name in ("default", "megatron"))
    assert differing(one, other) == {
        "data.format": ("native", "megatron_npy"),
        "outputs.data": ("r1-qwen3-8b-sft-data", "r1-qwen3-8b-sft-megatron-data"),
    }
    merge = config_of("convert", ("merge",), "r1-qwen3-8b")
    assert merge["checkpoint.path"] == "artifact:r1-qwen3-8b-lora-checkpoint"
    assert merge["model.path"] == unsloth["model.path"]
    assert merge["outputs.model"] == "r1-qwen3-8b-lora-merged"
