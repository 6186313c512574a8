"""Checkpoint folders that are whole or absent. Standard library only.

TRL's trainer writes `checkpoints/.staging/checkpoint-N`. When it is complete it is made durable and renamed to
`checkpoints/iter_NNNNNNN`; the tracker file is written last, so what it names is whole whatever happened.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import fsync_folder, fsync_tree, write_atomic
from nemotron_recipes.rundir import TRACKER, latest_checkpoint

STAGING = ".staging"
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_ADAPTERS = ("adapter_model.safetensors",)
_FOLDER = re.compile(r"iter_(\d{7,})")


def staging_folder(root: Path) -> Path:
    """Where unfinished checkpoints lie; nothing ever resumes from there."""
    return root / STAGING


def clear_staging(root: Path) -> None:
    """Remove what an earlier attempt left unfinished."""
    shutil.rmtree(staging_folder(root), ignore_errors=True)
    for folder in root.glob("iter_*.removing"):
        shutil.rmtree(folder, ignore_errors=True)


def commit_checkpoint(root: Path, step: int, keep: int) -> Path:
    """Turn the staged checkpoint of `step` into the newest one, and remove all but the `keep` newest."""
    staged = staging_folder(root) / f"checkpoint-{step}"
    target = root / f"iter_{step:07d}"
    fsync_tree(staged)
    if target.exists():  # this step was saved by an earlier attempt; the tracker must not name half of two
        _remove(target)
    os.rename(staged, target)
    fsync_folder(root)
    write_atomic(root / TRACKER, f"{step}\n")
    found = sorted((int(match[1]), p) for p in root.iterdir() if (match := _FOLDER.fullmatch(p.name)))
    older = [folder for number, folder in found if number < step]
    for folder in older[: max(0, len(older) - (keep - 1))]:
        _remove(folder)
    return target


def checkpoint_to_resume(resume_from: str | None, root: Path, attempt: int, adapters: bool = False) -> Path | None:
    """The checkpoint to continue from: this run's own newest one on a later attempt, else `resume_from`, else None.

    adapters: what was trained are LoRA adapters. UserError: `resume_from` names none, one that isn't whole, or one of
    the other kind. Training never starts anew by accident.
    """
    if attempt > 1 and (root / TRACKER).is_file():
        return _whole(_tracked(root), adapters)
    if resume_from is None:
        return None
    given = Path(resume_from)
    if (given / TRACKER).is_file():
        given = _tracked(given)
    if not given.is_dir():
        raise UserError(Problem(f"there is no checkpoint {given}", "checkpoint.load", "give an iter_NNNNNNN folder"))
    return _whole(given, adapters)


def _tracked(root: Path) -> Path:
    newest = latest_checkpoint(root)
    if newest is None:
        raise UserError(Problem(f"the checkpoint that {root / TRACKER} names is missing"))
    return newest


def _whole(folder: Path, adapters: bool) -> Path:
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in (_ADAPTERS if adapters else _WEIGHTS)):
        missing.append("the adapters" if adapters else "the weights")
    if missing:
        what = f"{folder} isn't a whole checkpoint of the trl backend: {', '.join(missing)} missing"
        raise UserError(Problem(what, fix="choose another iter_NNNNNNN folder"))
    return folder


def _remove(folder: Path) -> None:
    """Out of sight first: a crash in between leaves no half checkpoint under a valid name."""
    doomed = folder.with_name(folder.name + ".removing")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
