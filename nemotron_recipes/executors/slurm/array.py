"""What srun starts in each task of a stage's array: python -m nemotron_recipes.executors.slurm.array LAUNCH.json

The task becomes the process that does its part of the stage's work beforehand (`Launch.part_module`). It writes none of
the launcher's events and no report: the stage's own job, which starts when all tasks are over, does whatever is not
there by then. Standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nemotron_recipes.executors.slurm.launch import stage_environment
from nemotron_recipes.rundir import RunDir

TASK_ENV = "SLURM_ARRAY_TASK_ID"


def main(argv: list[str] | None = None) -> int:
    """Start the part whose number Slurm has given this task; comes back only where it can't be started."""
    (path,) = argv if argv is not None else sys.argv[1:]
    launch = json.loads(Path(path).read_text(encoding="utf-8"))
    environ = stage_environment(launch, RunDir(Path(launch["run_dir"])), dict(os.environ))
    words = [*launch["part_argv"], "--part", f"{os.environ[TASK_ENV]}/{launch['parts']}"]
    os.chdir(launch["workdir"] or launch["cwd"])
    try:
        os.execvpe(words[0], words, environ)
    except OSError as error:
        print(f"{words[0]} can't be started: {error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
