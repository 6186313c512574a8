"""A process and everything that it started, as one: found through /proc, ended so that no part sees another die.

A subreaper adopts what its descendants leave behind, so nothing below it ever gets away. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GONE = ("Z", "X", "")  # zombies have nothing left but an exit status

_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """From now on, orphans among this process's descendants become its children."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(sig: signal.Signals, parent: int) -> None:
    """Have the kernel send `sig` to this process when `parent`, which started it, ends."""
    _prctl(PR_SET_PDEATHSIG, sig)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), sig)


def kill_trees(roots: list[int], seconds: float = 10) -> None:
    """SIGKILL to `roots` and all their descendants, never to the caller; returns when they are gone, but for zombies.

    All are stopped before the first one dies: to each other they vanish at once, as in a power failure.
    """
    frozen: set[int] = set()
    while new := with_descendants(roots) - frozen - {os.getpid()}:
        for pid in new:  # what it forked before it stopped is found in the next round
            _send(pid, signal.SIGSTOP)
        frozen |= new
    for pid in frozen:
        _send(pid, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in frozen if state(pid) not in GONE]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(alive)} are still there {seconds:g} s after SIGKILL")
        time.sleep(0.01)


def with_descendants(roots: list[int]) -> set[int]:
    """`roots` and every process below them that is not a zombie."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))) and fields[0] not in GONE:
            children.setdefault(int(fields[1]), []).append(int(entry))
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return {pid for pid in found if state(pid) not in GONE}


def state(pid: int) -> str:
    """The state letter of proc(5); "" when there is no such process."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def is_child(pid: int, parent: int) -> bool:
    """Whether `pid` is alive and `parent` is its parent."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in GONE and int(fields[1]) == parent


def children(parent: int) -> list[int]:
    """Children of `parent`, a process of one thread or more, that are alive; [] when there is no such process."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path("/proc", str(parent), "task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return [pid for pid in found if state(pid) not in GONE]


def naming(text: str) -> dict[int, str]:
    """Processes other than this one whose command line holds `text`, with that line."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                line = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                if text in line and state(int(entry)) not in GONE:
                    found[int(entry)] = line.strip()
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: [state, parent, ...]. [] when there is no such process."""
    try:
        text = Path("/proc", str(pid), "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()  # the command's name may hold spaces and brackets


def _send(pid: int, sig: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sig)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
