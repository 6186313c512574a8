"""What planning reads where the run will be: its store, inputs by path, checkpoints. Called through `transport.call`.

Arguments and results are plain data, paths are text: on a machine that is reached over SSH these very functions run
(executors/remote/agent.py). Standard library only.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.fsio import path_digest
from nemotron_recipes.planning import history
from nemotron_recipes.rundir import RunDir, latest_checkpoint, read_json
from nemotron_recipes.spec import Artifact, Placement, Tree

# How Transformers names models with another head than one that continues a text.
_OTHER_HEADS = tuple(
    f"For{task}"
    for task in (
        *("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"),
        *("PreTraining", "NextSentencePrediction", "ImageClassification", "CTC"),
    )
)


def stored(root: str, reference: str) -> Tree:
    """The version that a reference means now. UserError when there is none."""
    return asdict(Store(Path(root)).resolve(reference))


def verify(root: str, reference: str) -> None:
    """Read all the data of a version. UserError: it is not what was recorded."""
    store = Store(Path(root))
    store.verify(store.resolve(reference))


def versions(root: str, name: str) -> list[int]:
    """Numbers of the whole versions of a name."""
    return Store(Path(root)).versions(name)


def made(root: str, fingerprint: str, slot: str, name: str) -> Tree | None:
    """The newest version of a name that a stage of this fingerprint made."""
    found = Store(Path(root)).find(fingerprint, slot, name)
    return asdict(found) if found else None


def exists(path: str) -> bool:
    """Whether anything lies there."""
    return os.path.exists(path)


def digest(path: str) -> str:
    """Of what a path or glob names now; FileNotFoundError when that is nothing."""
    return path_digest(path)


def path_input(path: str, kind: str) -> Tree:
    """A file, folder or glob as an input, with its digest. UserError: it isn't there, or is none of that kind."""
    place = Path(path)
    if kind in ("model", "tokenizer") and place.exists() and not place.is_dir():
        raise UserError(Problem(f"{path} is not a folder", fix=f"a {kind} is a Hugging Face folder"))
    if kind == "model" and place.is_dir() and not (place / "config.json").is_file():
        raise UserError(Problem(f"{path} holds no config.json", fix="a model is a Hugging Face folder"))
    if kind == "model" and place.is_dir() and (other := _no_causal_model(place)):
        fix = "models that continue a text are trained here: one whose architecture ends in ForCausalLM"
        raise UserError(Problem(f"{path} holds {other}, which is no causal language model", fix=fix))
    try:
        return asdict(Artifact("path", kind, uri=path, digest=path_digest(path)))
    except FileNotFoundError:
        raise UserError(Problem(f"nothing at {path}", fix=_near(place))) from None
    except OSError as error:
        raise UserError(Problem(f"{error.filename or path} can't be read: {error.strerror}")) from None


def checkpoint(path: str) -> Tree:
    """A whole checkpoint: an iter_NNNNNNN folder, or the newest below a folder. UserError when there is none."""
    place = Path(path)
    folder = place if place.name.startswith("iter_") else latest_checkpoint(place)
    if folder is None or not folder.is_dir():
        fix = "give an iter_NNNNNNN folder, or the folder that holds latest_checkpointed_iteration.txt"
        raise UserError(Problem(f"no whole checkpoint at {path}", fix=fix))
    return asdict(Artifact("path", "checkpoint", uri=str(folder), digest=path_digest(str(folder))))


def resumable(runs: str, fingerprint: str) -> str | None:
    """Newest whole checkpoint of the newest run of a stage with this fingerprint that did not succeed."""
    folder = Path(runs)
    plans = list(folder.glob("*/plan.json")) if folder.is_dir() else []
    for plan_file in sorted(plans, key=lambda p: p.stat().st_mtime, reverse=True):
        plan = read_json(plan_file) or {}
        for stage in plan.get("stages", ()):
            if stage["fingerprint"] != fingerprint:
                continue
            place = RunDir(plan_file.parent).stage(stage["name"])
            if (read_json(place.record) or {}).get("state") == "succeeded":
                continue
            found = latest_checkpoint(place.checkpoints)
            if found:
                return str(found)
    return None


def wall_time(runs: str, fingerprint: str, config: Tree, placement: Tree) -> Tree | None:
    """How long a stage of this fingerprint took, or will take: {seconds, run, smoke}. None: no run says."""
    found = history.wall_time(Path(runs), fingerprint, config, Placement(**placement))
    return asdict(found) if found else None


def smoke_run(runs: str, config: Tree, steps: int, placement: Tree) -> str | None:
    """The newest run that has shown there, under the memory watchdog, that so many steps of such a stage fit."""
    return history.find_smoke(Path(runs), config, steps, on=placement)


def _no_causal_model(folder: Path) -> str:
    """The architecture in a model's config.json, where that is plainly another kind of model; else ""."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(config, dict):
        return ""
    named = [str(name) for name in config.get("architectures") or ()]
    if not named or not (config.get("is_encoder_decoder") or all(name.endswith(_OTHER_HEADS) for name in named)):
        return ""
    return ", ".join(named)


def _near(path: Path) -> str:
    """What to do where nothing lies at `path`."""
    if not path.parent.is_dir():
        return f"{path.parent} does not exist either"
    near = nearest(path.name, os.listdir(path.parent))
    return near if near.startswith("did") else "give a path that exists, hf://ORG/NAME or artifact:NAME"
