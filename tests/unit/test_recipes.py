"""Every recipe of the package composes, validates and plans, on every executor that is registered."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.config.catalog import Catalog, package_root
from nemotron_recipes.config.profiles import Environment
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
REQUIRED = {"data_prep": ("data.sources=[{path: 'sample:largest_of_three', rows: 8}]",)}


@pytest.mark.parametrize("executor", sorted(REGISTRY))
@pytest.mark.parametrize(("family", "words", "config"), RECIPES, ids=lambda part: str(part))
def test_recipe_plans_and_renders(
    family: str, words: tuple[str, ...], config: str, executor: str, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    made = ("sft-data", "dpo-data", "kto-data", "rl-data", "sft", "spark-sft")  # by earlier stages
    for name in made:
        for prefix in (family, f"{family}-tiny"):
            staged = store.stage(f"{prefix}-{name}")
            (staged.content / "content.txt").write_text("made by a test")
            store.commit(staged, kind="model" if name.endswith("sft") else "data")
    overrides = REQUIRED["data_prep"] if words[0] == "data" and config == "default" else ()
    environment = Environment(
        tmp_path,
        artifacts={"output": str(tmp_path), "store": str(store.root)},
        profiles={"here": HARNESSES[executor].profile},
    )
    request = Request(family, words, config, "run", "here", overrides, offline=True, cwd=str(tmp_path))
    plan = make_plan(request, CATALOG, environment)
    rendered = get_executor(executor).render(plan)
    assert [s.name for s in rendered.stages] == [s.name for s in plan.stages]
    assert all(stage.files and stage.argv for stage in rendered.stages)
