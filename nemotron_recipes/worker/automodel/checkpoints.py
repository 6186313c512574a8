"""AutoModel's checkpoints in the layout of all backends.

AutoModel writes `epoch_E_step_S` (S counts from 0) and then the link LATEST. When LATEST names a folder, that one is
whole: it gets the name iter_NNNNNNN beside it, as a link, and the tracker file after that.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import TRACKER, latest_checkpoint
from nemotron_recipes.worker.sealing import own_newest

LATEST = "LATEST"
_FOLDER = re.compile(r"epoch_(\d+)_step_(\d+)")
_LINK = re.compile(r"iter_(\d{7,})")


def adopt(root: Path, keep: int) -> Path | None:
    """Take the newest whole checkpoint over into our layout, and remove all but the `keep` newest."""
    newest = _latest(root)
    if newest is None:
        return latest_checkpoint(root)
    step = _steps(newest)
    link = root / f"iter_{step:07d}"
    if not link.is_symlink():
        link.symlink_to(newest.name)
    if latest_checkpoint(root) != link:
        write_atomic(root / TRACKER, f"{step}\n")
        _remove_old(root, keep)
    return link


def clear_unfinished(root: Path) -> None:
    """Remove what a killed attempt left: AutoModel refuses to save where a folder of that name exists."""
    whole = {link.resolve() for link in root.glob("iter_*") if link.is_symlink()}
    for folder in root.glob("epoch_*_step_*"):
        if folder.resolve() not in whole:
            shutil.rmtree(folder)


def to_resume(resume_from: str | None, root: Path, attempt: int) -> Path | None:
    """The checkpoint to continue from: this run's own newest on a later attempt, else `resume_from`, else None."""
    if attempt > 1 and (own := _latest(root) or own_newest(root)):
        return own.resolve()  # LATEST first: adopted or not, every rank must find the same one
    if resume_from is None:
        return None
    given = Path(resume_from)
    if not (given / "model").is_dir():
        fix = "give an iter_NNNNNNN folder of a run of the automodel backend"
        raise UserError(Problem(f"{given} isn't a whole checkpoint of AutoModel", "checkpoint.load", fix))
    return given.resolve()


def named(folder: Path) -> Path:
    """The same under the name that it has in our layout, whether or not it has got that yet."""
    return folder.parent / f"iter_{steps_of(folder):07d}" if _FOLDER.fullmatch(folder.name) else folder


def model_folder(checkpoint: Path, adapters: bool) -> Path:
    """The Hugging Face folder inside a checkpoint: of the whole model, or of the adapters."""
    model = checkpoint / "model"
    return model if adapters else model / "consolidated"


def steps_of(folder: Path | None) -> int:
    """Steps done when AutoModel wrote it; 0 without one."""
    return _steps(folder) if folder and _FOLDER.fullmatch(folder.name) else 0


def _latest(root: Path) -> Path | None:
    link, text = root / LATEST, root / f"{LATEST}.txt"
    if link.is_symlink():
        target = root / os.readlink(link)
    elif text.is_file():  # where the file system has no links
        target = root / text.read_text(encoding="utf-8").strip()
    else:
        return None
    return target if target.is_dir() and _FOLDER.fullmatch(target.name) else None


def _steps(folder: Path) -> int:
    """Steps done when it was written."""
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None
    return int(match[2]) + 1


def _remove_old(root: Path, keep: int) -> None:
    links = sorted((int(match[1]), p) for p in root.iterdir() if (match := _LINK.fullmatch(p.name)))
    for _, link in links[:-keep]:
        folder = link.resolve()
        link.unlink()  # first, so that no half checkpoint carries a valid name
        shutil.rmtree(folder, ignore_errors=True)
