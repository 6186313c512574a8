"""NeMo-RL's checkpoints in the layout of all backends. Standard library only.

NeMo-RL writes `tmp_step_N`, renames it to `step_N` when it is whole, and removes old ones itself. A whole one gets the
name iter_NNNNNNN beside it, as a link, and the tracker file after that.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import TRACKER, latest_checkpoint
from nemotron_recipes.worker.guest import link_tree, step_of

_FOLDER = re.compile(r"step_(\d+)")


def adopt(root: Path) -> Path | None:
    """Give the newest whole checkpoint our name; names of removed ones go. Returns it, or None where there is none."""
    newest = max(((int(m[1]), p) for p in root.glob("step_*") if (m := _FOLDER.fullmatch(p.name))), default=None)
    for link in root.glob("iter_*"):
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)
    if newest is None:
        return None
    step, folder = newest
    link = root / f"iter_{step:07d}"
    if not link.is_symlink():
        link.symlink_to(folder.name)
    if latest_checkpoint(root) != link:
        write_atomic(root / TRACKER, f"{step}\n")
    return link


def continue_from(given: Path | None, root: Path) -> None:
    """NeMo-RL continues from the newest in `root`: another run's checkpoint is put there, under its name."""
    if given is None or adopt(root) is not None:
        return
    if not (given / "training_info.json").is_file():
        fix = "give an iter_NNNNNNN folder of a run of the nemo_rl backend"
        raise UserError(Problem(f"{given} isn't a whole checkpoint of NeMo-RL", "checkpoint.load", fix))
    step = step_of(given)
    partial = root / f"tmp_step_{step}"
    link_tree(given.resolve(), partial)
    os.rename(partial, root / f"step_{step}")
