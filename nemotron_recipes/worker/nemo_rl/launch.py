"""Starts a program of NeMo-RL with its clock set: launch.py BEGAN MARK SCRIPT ARGUMENTS...

NeMo-RL counts `checkpoint_must_save_by` from where its training loop begins, which is after Ray, the conversion of the
weights and vLLM have started. Here it counts from BEGAN (seconds since the epoch), and the file MARK says that it was
this limit that ended the loop. Its loops take `TimeoutChecker` from nemo_rl.utils.timer, read in v0.7.0. Run by path in
NeMo-RL's Python: standard library only.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> None:
    """RuntimeError: this NeMo-RL's clock is another one, so that the job's deadline would be missed."""
    began, mark, script = float(argv[0]), Path(argv[1]), os.path.abspath(argv[2])
    sys.argv = [script, *argv[3:]]
    sys.path[0] = os.path.dirname(script)  # as if Python had been given the script
    set_clock(began, mark)
    runpy.run_path(script, run_name="__main__")


def set_clock(began: float, mark: Path) -> None:
    """Before anything of NeMo-RL takes the class out of its module."""
    from nemo_rl.utils import timer  # type: ignore[import-not-found,unused-ignore]

    class Clock(timer.TimeoutChecker):  # type: ignore[misc,unused-ignore]
        def __init__(self, *given: Any, **named: Any):
            super().__init__(*given, **named)
            self.start_time = began

        def check_save(self) -> bool:
            due = bool(super().check_save())
            if due:
                mark.touch()
            return due

    if not isinstance(getattr(timer.TimeoutChecker("00:00:00:01"), "start_time", None), float):
        raise RuntimeError("TimeoutChecker of this NeMo-RL has no start_time: it would save after the job's deadline")
    timer.TimeoutChecker = Clock


if __name__ == "__main__":
    main(sys.argv[1:])
