"""The first process of a stage's container: python -m nemotron_recipes.executors.docker.launch ARGV...

It starts ARGV with the run's secrets added to the environment and its output in the run folder, passes on a wish to
stop, reaps orphans, and ends with ARGV's exit code (128+n for signal n). The output needs no docker log: whatever
becomes of the daemon, no line is lost or comes twice. Standard library only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from nemotron_recipes.executors.docker import files
from nemotron_recipes.executors.docker.files import Report
from nemotron_recipes.rundir import ATTEMPT_ENV, RunDir, StageDir, read_json

_NOT_STARTED = 127  # as a shell has it


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments are, in the stage's folder."""
    command = argv if argv is not None else sys.argv[1:]
    stage = StageDir(Path.cwd())
    # A line of a dry run that somebody has pasted into a shell has none.
    attempt = int(os.environ.get(ATTEMPT_ENV) or stage.last_attempt() + 1)
    os.environ[ATTEMPT_ENV] = str(attempt)
    node = int(os.environ.get(files.NODE_ENV, "0"))
    stopped = False
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if not stopped and child is not None:
            child.terminate()
        stopped = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    stage.logs(attempt).mkdir(parents=True, exist_ok=True)  # on another host nobody else has
    environ = {**os.environ, **(read_json(files.secrets(RunDir(stage.path.parent))) or {})}
    with open(stage.launcher_log(attempt, node), "ab") as log:
        try:
            child = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        except OSError as error:
            log.write(f"{command[0]} can't be started in {socket.gethostname()}: {error.strerror}\n".encode())
            return _NOT_STARTED
    if stopped:  # it came before there was anything to stop
        child.terminate()
    code = _reap_until_end_of(child.pid)
    files.write_report(stage, attempt, Report(code, stopped, time.time()), node)
    return code


def _reap_until_end_of(pid: int) -> int:
    """The exit code of `pid`; whoever loses its parent becomes a child of this process, and is buried by it."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
