"""Submissions that are broken at their Nth step, each in a process of its own, forked from one that has imported all.

`python -m tests.helpers.cut_submission` reads trials as JSON lines: {how, step, near, far, login}. A step is a call to
the cluster's machine that changes something. how: `kill` ends the process by SIGKILL before the step, `kill-after`
while it is under way; `cut` and `cut-after` end the connection instead; `lost` lets it be done and loses the answer;
`full` fills the file system that holds `far`, until the submission is over. Answers with {code, steps, said}; code is
None where it was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemotron_recipes import lifecycle
from nemotron_recipes.errors import NemotronError
from nemotron_recipes.executors.remote import sites, ssh, there, there_changes, transport
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.planning import code
from tests.helpers.plans import plan_of, probe_stage

QUESTIONS = (there.run, there_changes.of_run, there.answered, there.forestall, there.user)
STAGES = ("first", "second")
FILLER = "filler"


def trial(how: str, step: int, near: str, far: str, login: dict[str, Any]) -> None:
    """One submission of two held jobs."""
    from tests.helpers.executor_harness import placement

    _break_at(how, step, Path(far).parent)
    more = {"additional_parameters": {"hold": True}, **login}
    place = placement(SlurmExecutor(), **more)
    plan = plan_of(Path(far), *(probe_stage(name, placement=place) for name in STAGES))
    home = Path(near) if login else None
    with transport.through(sites.of_profile(login)):
        prepared = lifecycle.rendered(plan, home)
    lifecycle.submit(prepared, preflight=False)


def fill(folder: Path) -> None:
    """Until nothing more can be written there, not even a name."""
    with suppress(OSError), open(folder / FILLER, "ab", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)


def _break_at(how: str, number: int, far: Path) -> None:
    steps = 0

    def broken(original: Any) -> Any:
        def call(self: Any, function: Any, *args: Any) -> Any:
            nonlocal steps
            if function in QUESTIONS:
                return original(self, function, *args)
            steps += 1
            print(function.__name__, file=sys.stderr, flush=True)
            if steps != number:
                return original(self, function, *args)
            if how in ("kill", "cut"):
                _end(how, self)
            elif how == "full":
                fill(far)
            elif how.endswith("after"):
                threading.Timer(0.005, _end, (how, self)).start()
            done = original(self, function, *args)
            if how == "lost":
                raise transport.Unreachable("the answer was lost")
            if how == "kill-after":
                time.sleep(60)
            return done

        return call

    for kind in (transport.Here, ssh.Remote):
        kind.call = broken(kind.call)  # type: ignore[method-assign]


def _end(how: str, where: Any) -> None:
    if how.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    session = where.connection._session
    if session is not None:
        session._process.kill()


def main() -> None:
    """Fork for each line."""
    code.snapshot = lambda *_: None  # type: ignore[assignment]  the sources are not what is tested
    for line in sys.stdin:
        told = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.dup2(write, 2)
            ended = 0
            try:
                trial(**told)
            except NemotronError as error:
                print(f"!{error}", file=sys.stderr, flush=True)
                ended = error.exit_code
            os._exit(ended)
        os.close(write)
        with os.fdopen(read, errors="replace") as said:
            text = said.read()
        _, status = os.waitpid(pid, 0)
        Path(told["far"]).with_name(FILLER).unlink(missing_ok=True)
        ended_with = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        steps = [word for word in text.splitlines() if hasattr(there, word)]
        print(json.dumps({"code": ended_with, "steps": steps, "said": text}), flush=True)


if __name__ == "__main__":
    import nemotron_recipes.executors.nemo_adapter  # noqa: F401

    main()
