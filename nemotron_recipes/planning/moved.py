"""What stands between a saved plan and its request planned now: moved inputs, code or config, or an edited file."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from nemotron_recipes.config.tree import flatten
from nemotron_recipes.spec import Artifact, Plan, StagePlan

# What planning derives from config, inputs and placement alone; compared where those are the same.
DERIVED = ("launch", "fingerprint", "outputs", "directory", "kind", "method", "words", "config_name")


def moved(saved: Plan, now: Plan) -> list[str]:
    """Everything that differs, in words; empty when the saved plan is what planning gives now, ids and times aside."""
    found = []
    if saved.code.digest != now.code.digest:
        found.append(f"the code changed ({_short(saved.code.digest)} -> {_short(now.code.digest)})")
    for place in ("run_dir", "store"):
        was, is_ = getattr(saved, place), getattr(now, place).replace(now.id, saved.id)
        if was != is_:
            found.append(f"{place} was {was}, is {is_}")
    if [s.name for s in saved.stages] != [s.name for s in now.stages]:
        return [*found, "the recipe has other stages now"]
    for before, after in zip(saved.stages, now.stages, strict=True):
        found += _moved_stage(before, after) or ([] if found else _edited(before, after, saved.id, now.id))
    return found


def _moved_stage(before: StagePlan, after: StagePlan) -> list[str]:
    found = []
    old, new = flatten(before.config), flatten(after.config)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            found.append(f"{before.name}: {key} was {old.get(key)!r}, is {new.get(key)!r}")
    for key in sorted(before.inputs.keys() | after.inputs.keys()):
        was, is_ = before.inputs.get(key), after.inputs.get(key)
        if was is None or is_ is None or was.identity != is_.identity or (was.digest and is_.digest != was.digest):
            found.append(f"{before.name}: input {key} was {_pin(was)}, is {_pin(is_)}")
    if before.placement != after.placement:
        found.append(f"{before.name}: where it runs changed (profile {before.placement.profile})")
    return found


def _edited(before: StagePlan, after: StagePlan, saved_id: str, now_id: str) -> list[str]:
    """Derived parts that differ although nothing has moved: somebody edited the file, or PYTHONPATH is another."""

    def told(stage: StagePlan, part: str) -> Any:
        return json.loads(json.dumps(asdict(stage)[part]).replace(now_id, saved_id))

    if told(before, "inputs") != told(after, "inputs"):
        return []  # an input that was pending then is registered now: its files name the version
    return [
        f"{before.name}: {key} is not what this plan's own config and inputs give"
        for part in DERIVED
        for key in _differing(part, told(before, part), told(after, part))
    ]


def _differing(name: str, before: Any, after: Any) -> list[str]:
    if before == after:
        return []
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [name]
    return [key for k in sorted({*before, *after}) for key in _differing(f"{name}.{k}", before.get(k), after.get(k))]


def _pin(artifact: Artifact | None) -> str:
    if artifact is None:
        return "absent"
    return f"{artifact.label} {_short(artifact.digest)}".strip()


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
