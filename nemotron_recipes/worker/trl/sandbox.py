"""Code of a completion against tests, in a process of its own with little to break.

What holds it: a time-out, limits on memory, CPU time and files, an empty folder as home, an environment without
secrets. Where the kernel knows how (Landlock, seccomp: sandbox_walls.py), it can read no file but its own and Python's,
write none elsewhere, has no network, and reaches no other process; where the kernel allows namespaces it has process
ids of its own, too, and a limit on processes. When it has ended, or its time has, whatever it started is killed.
`left_open` says what this machine could not close.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
GRACE = 30.0  # seconds that the supervisor has beyond the program's own


@dataclass(frozen=True)
class Outcome:
    """finished: it got to the end, tests included; output: what it printed, at most 64 KiB; left_open: which of
    "files", "network" and "signals" (to other processes) it could have reached."""

    finished: bool
    timed_out: bool
    output: str
    left_open: Sequence[str] = ()


def share_passed(code: str, tests: str | list[dict[str, str]], seconds: float, memory: int) -> float:
    """`tests`: Python that raises where something is wrong (all or nothing), or pairs of what is typed in and what must
    be printed (line ends and outer blanks aside)."""
    if isinstance(tests, str):
        return float(run(code, seconds, memory, tests=tests).finished)
    outcomes = [(run(code, seconds, memory, typed=test["input"]), test["output"]) for test in tests]
    return sum(o.finished and _lines(o.output) == _lines(wanted) for o, wanted in outcomes) / len(outcomes)


def run(code: str, seconds: float, memory: int, tests: str = "", typed: str = "") -> Outcome:
    """Run `code`, then `tests` in the same names, with `typed` as standard input. What it does never raises."""
    request = {"code": code, "tests": tests, "typed": typed, "seconds": seconds, "memory": memory}
    folder = tempfile.TemporaryDirectory(prefix="nemotron-code-", ignore_cleanup_errors=True)
    try:
        return _supervised(request, folder.name, seconds)
    finally:
        try:
            folder.cleanup()
        except RecursionError:  # Python before 3.13 goes down a tree of folders as deep as its own stack
            subprocess.run(("rm", "-rf", "--", folder.name), check=False, stderr=subprocess.DEVNULL)


def _supervised(request: dict[str, object], folder: str, seconds: float) -> Outcome:
    environment = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "PATH": os.defpath}
    supervisor = subprocess.Popen(
        [sys.executable, "-I", str(CHILD)],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with supervisor:
        try:
            said, trouble = supervisor.communicate(json.dumps(request).encode(), timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(supervisor.pid, signal.SIGKILL)
            return Outcome(False, True, "", ["signals"])  # the program has stopped it
    if supervisor.returncode < 0:
        return Outcome(False, False, "", ["signals"])  # or ended it
    if supervisor.returncode:
        raise RuntimeError(f"the supervisor of a program failed: {trouble.decode(errors='replace')[-2000:]}")
    return Outcome(**json.loads(said))


def walls() -> str:
    """What a program can't reach on this machine, and what it can; a sentence for people."""
    said = {
        "files": "files beside its own and Python's",
        "network": "the network",
        "signals": "other processes",
    }
    open_here = run("", 60.0, 512 << 20).left_open
    closed = [words for name, words in said.items() if name not in open_here]
    left = [words for name, words in said.items() if name in open_here]
    text = f"programs of completions can't reach {', '.join(closed)}" if closed else ""
    warning = f"they can reach {', '.join(left)}: this kernel, or the container's filter, has no way to close it"
    return "; ".join([*([text] if text else []), *([f"warning: {warning}"] if left else [])])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
