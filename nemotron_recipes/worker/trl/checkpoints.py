"""Checkpoint folders that are whole or absent. Standard library only.

TRL's trainer writes `checkpoints/.staging/checkpoint-N`. When it is complete it is made durable and renamed to
`checkpoints/iter_NNNNNNN`; the tracker file is written last, so what it names is whole whatever happened. What is not
whole goes to `checkpoints/partial`, out of reach. A checkpoint carries its digests in itself
(nemotron_recipes/checkpoints.py).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from nemotron_recipes.checkpoints import seal_inside
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import fsync_folder, fsync_tree, write_atomic
from nemotron_recipes.rundir import TRACKER, latest_checkpoint

STAGING = ".staging"
PARTIAL = "partial"
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_ADAPTERS = ("adapter_model.safetensors",)
_FOLDER = re.compile(r"iter_(\d{7,})")


def staging_folder(root: Path) -> Path:
    """Where unfinished checkpoints lie; nothing ever resumes from there."""
    return root / STAGING


def quarantine(root: Path, adapters: bool = False) -> list[Path]:
    """Move checkpoints that are not whole out of reach, before an attempt begins; returns where they lie now.

    Those that were never finished, and those that have lost files since; the tracker then names the newest whole one.
    What was moved earlier is removed when there is more: each takes as much room as a checkpoint.
    """
    found = _checkpoints(root)
    bad = {folder: f"{folder.name}.damaged" for folder in found.values() if _missing(folder, adapters)}
    for folder in staging_folder(root).glob("checkpoint-*"):
        if any(folder.iterdir()):
            bad[folder] = f"iter_{int(folder.name.rpartition('-')[2]):07d}.unfinished"
    moved = [root / PARTIAL / name for name in bad.values()]
    if bad:
        shutil.rmtree(root / PARTIAL, ignore_errors=True)
        (root / PARTIAL).mkdir()
    for folder, target in zip(bad, moved, strict=True):
        os.rename(folder, target)
    tracked = _tracked_step(root)
    whole = [step for step, folder in found.items() if folder not in bad and tracked is not None and step <= tracked]
    if whole and max(whole) != tracked:
        write_atomic(root / TRACKER, f"{max(whole)}\n")
    shutil.rmtree(staging_folder(root), ignore_errors=True)
    for folder in root.glob("iter_*.removing"):  # each was whole, and older than others
        shutil.rmtree(folder, ignore_errors=True)
    return moved


def commit_checkpoint(root: Path, step: int, keep: int) -> Path:
    """Turn the staged checkpoint of `step` into the newest one, and remove all but the `keep` newest."""
    staged = staging_folder(root) / f"checkpoint-{step}"
    target = root / f"iter_{step:07d}"
    seal_inside(staged)
    fsync_tree(staged)
    if target.exists():  # this step was saved by an earlier attempt; the tracker must not name half of two
        _remove(target)
    os.rename(staged, target)
    fsync_folder(root)
    write_atomic(root / TRACKER, f"{step}\n")
    older = [folder for number, folder in sorted(_checkpoints(root).items()) if number < step]
    for folder in older[: max(0, len(older) - (keep - 1))]:
        _remove(folder)
    return target


def checkpoint_to_resume(resume_from: str | None, root: Path, attempt: int, adapters: bool = False) -> Path | None:
    """The checkpoint to continue from: this run's own newest whole one on a later attempt, else `resume_from`, or None.

    adapters: what was trained are LoRA adapters. UserError: `resume_from` names none, one that isn't whole, or one of
    the other kind; or the run has saved, but none of its own is whole. Training never starts anew by accident.
    """
    if attempt > 1 and (root / TRACKER).is_file():
        return _newest_whole(root, adapters)
    if resume_from is None:
        return None
    given = Path(resume_from)
    if (given / TRACKER).is_file():
        given = _tracked(given)
    if not given.is_dir():
        raise UserError(Problem(f"there is no checkpoint {given}", "checkpoint.load", "give an iter_NNNNNNN folder"))
    return _whole(given, adapters)


def _newest_whole(root: Path, adapters: bool) -> Path:
    """The same on each rank, whether rank 0 has moved the others away already or not."""
    tracked = _tracked_step(root)
    for step, folder in sorted(_checkpoints(root).items(), reverse=True):
        if tracked is not None and step <= tracked and not _missing(folder, adapters):
            return folder
    return _whole(_tracked(root), adapters)


def _checkpoints(root: Path) -> dict[int, Path]:
    """Step -> folder of everything that carries the name of a checkpoint."""
    folders = root.iterdir() if root.is_dir() else ()
    return {int(match[1]): folder for folder in folders if (match := _FOLDER.fullmatch(folder.name))}


def _tracked_step(root: Path) -> int | None:
    try:
        return int((root / TRACKER).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _tracked(root: Path) -> Path:
    newest = latest_checkpoint(root)
    if newest is None:
        fix = f"look into {root / PARTIAL}; remove the file to start anew"
        raise UserError(Problem(f"the checkpoint that {root / TRACKER} names is missing", fix=fix))
    return newest


def _whole(folder: Path, adapters: bool) -> Path:
    missing = _missing(folder, adapters)
    if missing:
        what = f"{folder} isn't a whole checkpoint of the trl backend: {', '.join(missing)} missing"
        raise UserError(Problem(what, fix="choose another iter_NNNNNNN folder"))
    return folder


def _missing(folder: Path, adapters: bool) -> list[str]:
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in (_ADAPTERS if adapters else _WEIGHTS)):
        missing.append("the adapters" if adapters else "the weights")
    return missing


def _remove(folder: Path) -> None:
    """Out of sight first: a crash in between leaves no half checkpoint under a valid name."""
    doomed = folder.with_name(folder.name + ".removing")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
