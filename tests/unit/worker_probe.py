"""A worker started as the product starts it, with one more worker module in the registry: `probe` does as its file says."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from nemotron_recipes.errors import UserError
from nemotron_recipes.worker import runtime, workerfile
from nemotron_recipes.worker.context import Context


def run(config: dict[str, Any], ctx: Context) -> None:
    print(f"hello from rank {ctx.rank}", flush=True)
    os.system("echo from a child process")
    action = config.get("action", "write")
    if ctx.rank == config.get("only", ctx.rank):
        if action == "raise":
            raise ValueError("boom")
        if action == "user-error":
            raise UserError("no such column")
        if action == "import":
            import no_such_package  # noqa: F401
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    if action in ("raise", "sleep"):  # the ranks that don't fail
        ctx.event("sleeping")
        time.sleep(30)
    if action == "watch":
        while not ctx.stop_requested():
            time.sleep(0.02)
            ctx.event("sleeping")
        print("saved")
        return
    if ctx.is_main and action != "nothing":
        for slot in ctx.declared:
            (ctx.output(slot) / "data.txt").write_text(str(config.get("text", "")))
        ctx.results["loss"] = config.get("loss", 0.5)
        ctx.metadata["rows"] = 3


if __name__ == "__main__":
    workerfile.REGISTRY["probe"] = ("worker_probe", "probing")
    sys.exit(runtime.main())
