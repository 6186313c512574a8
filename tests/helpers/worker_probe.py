"""A worker started as the product starts it, with one more module in the registry: `probe` does as its file says.

    python -m tests.helpers.worker_probe --config FILE

action: write | write-and-raise | nothing | watch | sleep | raise | user-error | import | kill | steps
only: the one rank that raises or is killed, once the others have begun to work (default: all)
"""

from __future__ import annotations

import json
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
    if action == "steps":
        _train(config, ctx)
    elif ctx.rank == config.get("only", ctx.rank):
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


def _train(config: dict[str, Any], ctx: Context) -> None:
    """Steps in which every rank waits for the others; in its first attempt rank `only` hangs at step `hang`.

    With `mute` rank 0 prints no line after the first step, though it goes on.
    """
    steps = config.get("steps", 20)
    for step in range(1, steps + 1):
        ctx.at("loading", step - 1, steps)
        if ctx.attempt == 1 and ctx.rank == config.get("only") and step == config.get("hang"):
            hangs_here()
        ctx.at("training", step - 1, steps)
        met = [ctx.dir.path / f"met-{ctx.attempt}-{step}-{rank}" for rank in range(ctx.world_size)]
        met[ctx.rank].touch()
        while not all(path.exists() for path in met):
            time.sleep(0.02)
        if ctx.is_main:
            if step == 1 or not config.get("mute"):
                print(f"step {step}/{steps}" + "." * config.get("padding", 0), flush=True)
            row = {"step": step, "steps": steps, "time": time.time(), "loss": 1.0}
            with open(ctx.dir.metrics, "a") as metrics:
                metrics.write(json.dumps(row) + "\n")
        time.sleep(config.get("pause", 0.05))
    ctx.at("ending", steps, steps)


def hangs_here() -> None:
    time.sleep(600)


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
