"""Runs side by side: what differs in config, code, inputs, environment and results. Pure reading, plain data out."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from nemotron_recipes import closing
from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.artifacts.stages import StageView
from nemotron_recipes.rundir import RunDir, StageDir, read_json
from nemotron_recipes.spec import Artifact, Tree

ABSENT = None
WARM_UP = 1  # logged steps that don't count for the step time: the first one compiles and allocates


def differences(a: RunView, b: RunView) -> Tree:
    """{section: {key: [value in a, value in b]}}; only what differs. Sections: plan, config, code, inputs, placement,
    environment, results. Keys of a stage begin with its name; a value that one side lacks is None."""
    sections: dict[str, Callable[[RunView], Tree]] = {
        "plan": _plan_facts,
        "config": config_of,
        "code": _code_of,
        "inputs": _inputs_of,
        "placement": _placement_of,
        "environment": _environment_of,
        "results": _results_of,
    }
    return {name: _differing([read(a), read(b)]) for name, read in sections.items()}


def stage_differences(a: tuple[RunView, str], b: tuple[RunView, str]) -> Tree:
    """The same for one stage of each run, whatever the two are called: config, code, environment."""
    sections: dict[str, Callable[[RunView, str], Tree]] = {
        "config": lambda view, stage: _unnamed(_by_stage(view, _config, {stage}), stage),
        "code": lambda view, _: _code_of(view),
        "environment": lambda view, stage: _unnamed(_environment_of(view), stage),
    }
    return {name: _differing([read(*a), read(*b)]) for name, read in sections.items()}


def _unnamed(tree: Tree, stage: str) -> Tree:
    """The keys of one stage, without its name."""
    return {key.removeprefix(f"{stage}."): value for key, value in tree.items() if key.startswith(f"{stage}.")}


def comparison(views: Iterable[RunView]) -> Tree:
    """`runs`: facts and figures of each; `config`: {key: [a value a run]}, only keys in which runs differ, and only of
    stages that all of them have."""
    found = list(views)
    shared = set.intersection(*({stage.name for stage in view.stages} for view in found))
    return {
        "runs": [_figures(view) for view in found],
        "config": _differing([_by_stage(view, _config, shared) for view in found]),
    }


def config_of(view: RunView) -> Tree:
    """Every leaf of every stage's config."""
    return _by_stage(view, _config)


def metrics_of(view: RunView, stage: str) -> list[Tree]:
    """The rows of metrics.jsonl."""
    return closing.metrics(RunDir(Path(view.path)).stage(stage))


def environment_of(view: RunView, stage: StageView) -> Tree:
    """What the stage's newest attempt ran on; empty when it never ran."""
    return read_json(StageDir(Path(view.path) / stage.name).environment(stage.attempt)) or {}


def step_figures(rows: list[Tree]) -> Tree:
    """steps; seconds_per_step and tokens_per_second (medians); memory_bytes (peak); None where nothing is known."""
    steps = [row for row in rows if "loss" in row]
    warm = steps[WARM_UP:] or steps

    def values(key: str, of: list[Tree]) -> list[float]:
        return [row[key] for row in of if row.get(key) is not None]

    def median(key: str) -> float | None:
        found = values(key, warm)
        return statistics.median(found) if found else None

    return {
        "steps": steps[-1]["step"] if steps else None,
        "seconds_per_step": median("seconds_per_step"),
        "tokens_per_second": median("tokens_per_second"),
        "memory_bytes": max(values("memory_bytes", steps), default=None),
    }


def _figures(view: RunView) -> Tree:
    return {
        "id": view.id,
        "state": view.state,
        "created": view.created,
        "stages": {
            stage.name: {
                "state": stage.state,
                "exit_code": stage.exit_code,
                "attempts": stage.attempt,
                "wall_seconds": round(stage.ended - stage.started, 3) if stage.started and stage.ended else None,
                **step_figures(metrics_of(view, stage.name)),
                "results": stage.results,
                "facts": stage.facts,
            }
            for stage in view.stages
        },
    }


def _plan_facts(view: RunView) -> Tree:
    request = view.plan.get("request", {})
    return {
        "command": f"nemotron {view.title}",
        "overrides": " ".join(request.get("overrides", ())),
        "executor": ", ".join(sorted({stage["placement"]["executor"] for stage in view.plan.get("stages", ())})),
        "store": view.plan.get("store"),
    }


def _code_of(view: RunView) -> Tree:
    """Digest, version and commit, and the digest of every source file that the run took along."""
    code = {key: view.plan.get("code", {}).get(key) for key in ("digest", "version", "git_commit", "git_diff_digest")}
    root = Path(view.path) / "code"
    files = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    digests = {f.relative_to(root).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()[:12] for f in files}
    return {**code, **digests}


def _inputs_of(view: RunView) -> Tree:
    """What each input was: of a stage that ran the exact version, else what was planned."""

    def read(planned: Tree, stage: StageView) -> Tree:
        exact = {p["input"]: {k: v for k, v in p.items() if k != "input"} for p in stage.parents}
        pinned = {key: Artifact.from_tree(tree) for key, tree in (exact or planned["inputs"]).items()}
        return {key: f"{a.label} {a.digest.removeprefix('sha256:')[:12]}".strip() for key, a in pinned.items()}

    return _by_stage(view, read)


def _placement_of(view: RunView) -> Tree:
    return _by_stage(view, lambda planned, _: flatten(planned["placement"]))


def _environment_of(view: RunView) -> Tree:
    """Every fact; the run's own folder and id read the same in all runs."""
    found = _by_stage(view, lambda _, stage: flatten(environment_of(view, stage)))
    text = {key: value for key, value in found.items() if isinstance(value, str)}
    return {**found, **{k: v.replace(view.path, "<run>").replace(view.id, "<run id>") for k, v in text.items()}}


def _results_of(view: RunView) -> Tree:
    def read(planned: Tree, stage: StageView) -> Tree:
        made = {f"output {slot}": output["digest"] for slot, output in stage.outputs.items()}
        return {"state": stage.state, "exit_code": stage.exit_code, **stage.results, **made}

    return _by_stage(view, read)


def _config(planned: Tree, _: StageView) -> Tree:
    return flatten(planned["config"])


def _by_stage(view: RunView, read: Callable[[Tree, StageView], Tree], only: Collection[str] | None = None) -> Tree:
    planned = {stage["name"]: stage for stage in view.plan.get("stages", ())}
    stages = [stage for stage in view.stages if only is None or stage.name in only]
    return {f"{s.name}.{key}": value for s in stages for key, value in read(planned[s.name], s).items()}


def _differing(trees: list[Tree]) -> Tree:
    keys = dict.fromkeys(key for tree in trees for key in tree)
    rows = {key: [tree.get(key, ABSENT) for tree in trees] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values[1:])}


def flatten(tree: Any, prefix: str = "") -> Tree:
    """Leaves by dotted path; an empty mapping and a list are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {prefix.rstrip("."): tree} if prefix else {}
    return {key: leaf for name, value in tree.items() for key, leaf in flatten(value, f"{prefix}{name}.").items()}
