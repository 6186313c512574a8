"""`python -m nemotron_recipes.worker.part --config FILE --part I/N`: part I (from 0) of N of a stage's work.

It is no attempt of the stage: it writes no record, no events and no output, only what the stage itself takes over from
the store. So it may be killed and started again at any time, on any machine that sees the store.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from pathlib import Path

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import NemotronError, Problem, UserError
from nemotron_recipes.rundir import ATTEMPT_ENV
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.inputs import resolve_inputs
from nemotron_recipes.worker.workerfile import REGISTRY, load_worker_file


def main(argv: list[str] | None = None) -> int:
    """Do one part; returns the exit code: 0 done, 1 failed, 2 wrong request."""
    parser = argparse.ArgumentParser(
        prog="python -m nemotron_recipes.worker.part", description="Do a part of a stage's work beforehand."
    )
    parser.add_argument("--config", required=True, metavar="FILE", type=Path, help="the stage's worker file")
    parser.add_argument("--part", required=True, metavar="I/N", type=_part, help="which part, from 0, of how many")
    options = parser.parse_args(argv)
    part, parts = options.part
    try:
        file = load_worker_file(options.config)
        store = Store(Path(file.run["store"]))
        # Not verified: what is left behind is named by the bytes that were read, and the stage verifies its inputs.
        inputs, artifacts = resolve_inputs(file.inputs, store, verify=False)
        module = importlib.import_module(REGISTRY[file.worker][0])
        if not hasattr(module, "run_part"):
            raise UserError(Problem(f"the work of {file.worker} can't be split into parts", str(options.config)))
        context = Context(
            rank=0,
            world_size=1,
            local_rank=0,
            attempt=int(os.environ.get(ATTEMPT_ENV, "0")),
            dir=file.dir,
            run=file.run,
            store=store,
            declared={},
            inputs=inputs,
            artifacts=artifacts,
        )
        module.run_part(file.config, context, part, parts)
    except NemotronError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    sys.exit(main())
