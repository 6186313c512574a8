"""Checkpoints of a trainer of another project get digests while it trains on, and are held against them before use."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from nemotron_recipes import checkpoints
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.rundir import RANKS_HERE_ENV, TRACKER, latest_checkpoint
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.deadline import deadline_from

QUIET = 15.0  # seconds: some trainers write small files right after the one that says that a checkpoint is whole
LEAST_LEFT = 15.0  # seconds before the deadline that the end of the worker needs


class Sealing:
    """Rank 0: `with Sealing(context) as sealing:` around all of a trainer's work; a thread reads each checkpoint that
    it is told of, the newest first. Training never waits for it, the end of the stage does as long as there is time.

    One that is removed meanwhile is let go, one that changes meanwhile is read again.
    """

    def __init__(self, context: Context):
        self.context, self.root = context, context.dir.checkpoints
        self._wanted: list[Path] = []
        self._news = threading.Condition()
        self._over = self._stopped = False  # no more will come; what has not been read stays unread
        self._thread = threading.Thread(target=self._run, name="digests", daemon=True)

    def __enter__(self) -> Sealing:
        """What an attempt before has not come to read is read now."""
        if self.context.is_main:
            newest = latest_checkpoint(self.root)
            checkpoints.forget(self.root, int(newest.name.rpartition("_")[2]) if newest else -1)
            self._thread.start()
            if newest is not None and not checkpoints.is_read(newest):
                self.saw(newest)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.context.is_main:
            return
        with self._news:
            self._over = True
            self._news.notify()
        try:
            self._thread.join(0.0 if error is not None else self._seconds())
        finally:
            self._stopped = True
        self._thread.join()

    def saw(self, checkpoint: Path) -> None:
        """This one is whole now."""
        with self._news:
            self._wanted.append(checkpoint)
            self._news.notify()

    def _seconds(self) -> float | None:
        """How long the end may wait: to the deadline; with an output to come, which is read as well, a part of that."""
        context, deadline = self.context, deadline_from(os.environ)
        if context.stop_seen and not context.time_is_up:
            return 0.0  # somebody wants it to end
        if deadline is None:
            return None
        left = max(0.0, deadline - LEAST_LEFT - time.time())
        return left if context.time_is_up else left / 3

    def _run(self) -> None:
        while (checkpoint := self._next()) is not None:
            try:
                whole = checkpoints.seal_beside(checkpoint, self._must_end)
            except OSError as error:  # nobody may fail for it: whoever goes on from there is told that digests lack
                if checkpoint.is_dir():  # old ones are removed
                    print(f"warning: {checkpoint.name} gets no digests: {error}", file=sys.stderr, flush=True)
                whole = True
            if not (whole or self._must_end()):
                self.saw(checkpoint)

    def _must_end(self) -> bool:
        """The end waits no longer, or somebody wants it while it waits."""
        return self._stopped or self.context.stop_signal

    def _next(self) -> Path | None:
        """The newest that is wanted, a while after it was seen; None: there is no more to do."""
        with self._news:
            self._news.wait_for(lambda: self._over or self._wanted)
            self._news.wait_for(lambda: self._over, QUIET)
            return self._wanted.pop() if self._wanted else None


def require_unchanged(context: Context, checkpoint: Path, alone: bool = False) -> None:
    """Before training goes on from a checkpoint, or it is converted. Damaged: a file is not what was saved.

    Ranks that see the same folder share the reading, unless this one is `alone` in calling it. Those on other hosts
    have a copy, which was compared when it came.
    """
    ranks = 1 if alone else int(os.environ.get(RANKS_HERE_ENV) or context.world_size)
    if context.rank >= ranks:
        return
    began = time.monotonic()
    found = checkpoints.check(checkpoint, context.rank, ranks)
    if not context.is_main:
        return
    known = "nothing" if found is None else "lengths" if found.unread else "digests"
    if known != "digests":
        why = "nobody has noted any" if found is None else "whoever saved it was ended before it had read all of it"
        print(f"warning: {checkpoint} carries no digests, and is used as it is: {why}", flush=True)
    seconds = round(time.monotonic() - began, 3)
    context.event("checkpoint-verified", checkpoint=str(checkpoint), known=known, seconds=seconds)


def require_input_unchanged(context: Context, key: str, checkpoint: Path) -> None:
    """The same of a checkpoint in an input. A version of the store was compared as a whole when the stage began."""
    artifact = context.artifacts.get(key)
    if artifact is None or artifact.source != "store":
        require_unchanged(context, checkpoint)


def given_checkpoint(resume_from: str) -> Path:
    """The folder that `checkpoint.load` names; the newest in a version of the store. UserError: there is none."""
    given = Path(resume_from)
    folder = given if given.name.startswith("iter_") else latest_checkpoint(given)
    if folder is None or not folder.is_dir():
        fix = f"give an iter_NNNNNNN folder, or one that holds {TRACKER}"
        raise UserError(Problem(f"there is no checkpoint {given}", "checkpoint.load", fix))
    return folder


def own_newest(root: Path) -> Path | None:
    """The newest whole checkpoint of this run; None: it has saved none. UserError: the one that the tracker names is
    not there, and training must not start anew by accident."""
    newest = latest_checkpoint(root)
    if newest is None and (root / TRACKER).is_file():
        fix = f"bring it back, or write into {TRACKER} the number of one that is there; remove that file to start anew"
        raise UserError(Problem(f"the checkpoint that {root / TRACKER} names is missing", fix=fix))
    return newest
