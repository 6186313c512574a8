"""One run's journal, told to W&B by the real SDK: the only process, beside pull.py's, that imports it.

    python -m nemotron_recipes.mirror.replay RUN [--wait SECONDS] [--follow PID] [--watcher PID]
    python -m nemotron_recipes.mirror.replay       only ask whether W&B answers

Whoever starts it watches it (sync.py): the SDK may wait for ever. Exit codes: 0 all told, 1 not all, 3 another process
is at it (with --wait: its end is awaited for so long).
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nemotron_recipes.errors import UserError
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.mirror.lease import RENEW_SECONDS, Lease
from nemotron_recipes.mirror.scratch import scratch
from nemotron_recipes.mirror.sync import BUSY, is_alive
from nemotron_recipes.mirror.telling import NotTold, Teller
from nemotron_recipes.redact import scrub, secret_values


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nemotron_recipes.mirror.replay")
    parser.add_argument("run", type=Path, nargs="?", help="without it: only ask whether W&B answers")
    parser.add_argument("--wait", type=float, metavar="SECONDS", default=0.0)
    parser.add_argument("--follow", type=int, metavar="PID", default=None)
    parser.add_argument("--watcher", type=int, metavar="PID", default=os.getppid(), help="it ends with that process")
    options = parser.parse_args(argv)
    with scratch() as folder:
        _prepare_environment(folder)
        if options.run is None:
            return _ask()
        journal = Journal(options.run)
        with _alone(journal, options.wait, options.watcher) as free:
            return _replay(journal, options.follow) if free else BUSY


def _replay(journal: Journal, follow: int | None) -> int:
    target = journal.target
    if target is None:
        return 0
    hidden = secret_values(os.environ)
    try:
        import wandb
        from wandb.errors import Error as WandbError
    except ModuleNotFoundError:
        journal.failed("the package 'wandb' isn't installed: pip install 'nemotron-recipes[wandb]'")
        return 1
    telling = ""
    try:
        teller = Teller(wandb, journal.run_dir, target)
        try:
            teller.tell(partial(is_alive, follow))
        finally:
            telling = teller.telling
    except (WandbError, NotTold, UserError, OSError, ValueError, TimeoutError) as error:
        said = scrub(str(error).strip() or type(error).__name__, hidden).splitlines()[0]
        text = f"{telling}: {said}" if telling else said
        journal.failed(text)
        print(f"{journal.run_dir.name}: {text}", file=sys.stderr)
        return 1
    return 0


def _ask() -> int:
    """0: W&B answers, and takes the key."""
    try:
        import wandb
        from wandb.errors import Error as WandbError
    except ModuleNotFoundError:
        return 1
    try:
        print(wandb.Api(timeout=30).default_entity)  # a question that every key may ask
        return 0
    except (WandbError, OSError, ValueError, TimeoutError):
        return 1


@contextmanager
def _alone(journal: Journal, seconds: float, watcher: int) -> Iterator[bool]:
    """Held while a run is told; False where another process holds it for longer than that."""
    lease = Lease(journal.folder)
    if not lease.take(seconds):
        yield False
        return
    try:
        lease.keep(partial(_end_at_once, "another process has taken over"))
        threading.Thread(target=_end_with, args=(watcher,), daemon=True).start()
        yield True
    finally:
        lease.release()


def _end_with(watcher: int) -> None:
    """Whoever started this process ends it when it gets stuck; without that one it would hold the lease for ever."""
    while os.getppid() == watcher:  # named by the starter: it may have ended before this process could ask
        time.sleep(RENEW_SECONDS)
    _end_at_once("who started this process has ended")


def _end_at_once(why: str) -> None:
    print(why, file=sys.stderr)
    os._exit(BUSY)


def _prepare_environment(folder: str) -> None:
    """The SDK's own files go to a folder that vanishes; settings of a trainer's own W&B run must not reach in here."""
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_PROJECT", "WANDB_ENTITY"):
        os.environ.pop(name, None)
    places = dict.fromkeys(("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"), folder)
    os.environ.update(places, WANDB_ERROR_REPORTING="false", WANDB_SILENT="true")


if __name__ == "__main__":
    sys.exit(main())
