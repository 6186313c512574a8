"""A worker started as the product starts it, with one more module in the registry: `probe` does as its file says.

    python -m tests.helpers.worker_probe --config FILE

action: write | write-and-raise | nothing | watch | sleep | raise | user-error | import | kill
only: the one rank that raises or is killed, once the others have begun to work (default: all)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from nemotron_recipes.errors import UserError
from nemotron_recipes.rundir import read_jsonl
from nemotron_recipes.worker import runtime, workerfile
from nemotron_recipes.worker.context import Context


def run(config: dict[str, Any], ctx: Context) -> None:
    """The worker module's entry."""
    print(f"hello from rank {ctx.rank}")
    subprocess.run(["echo", "hello from a child process"], check=True)
    action = config.get("action", "write")
    if ctx.rank == config.get("only", ctx.rank):
        if "only" in config:
            _wait_for_the_others(ctx)
        _misbehave(action)
    if action in ("raise", "kill", "sleep"):  # the ranks that behave
        ctx.event("sleeping")
        time.sleep(60)
    if action == "watch":
        ctx.stop_requested()
        ctx.event("sleeping")
        while not ctx.stop_requested():
            time.sleep(0.02)
        print("saved")
        time.sleep(config.get("linger", 0))
        return
    if ctx.is_main and action != "nothing":
        for slot in ctx.declared:
            (ctx.output(slot) / "data.txt").write_text(str(config.get("text", "")))
        ctx.results |= {"loss": float(config.get("loss", 0.5)), "rows": 3}
        ctx.metadata["rows"] = 3
    if action == "write-and-raise":
        raise ValueError("boom")


def _wait_for_the_others(ctx: Context) -> None:
    """torchrun stops the other ranks when one fails; a rank that is still starting then dies without a word."""
    for rank in set(range(ctx.world_size)) - {ctx.rank}:
        while not any(event["event"] == "sleeping" for event in read_jsonl(ctx.dir.events(ctx.attempt, rank))):
            time.sleep(0.02)


def _misbehave(action: str) -> None:
    if action == "raise":
        raise ValueError("boom")
    if action == "user-error":
        raise UserError("no such column")
    if action == "import":
        import no_such_package  # noqa: F401
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    workerfile.REGISTRY["probe"] = ("tests.helpers.worker_probe", "probing")
    sys.exit(runtime.main())
