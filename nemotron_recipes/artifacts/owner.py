"""Who owns unfinished work, and whether that process is provably gone. Standard library only.

A process is provably gone only when it lived under this very kernel boot and in this very PID namespace, and its PID
is free or belongs to a process that started at another time. Of other hosts and containers nothing can be proved.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """The identity of the calling process, as plain data to be written next to its unfinished work."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_time(os.getpid()), **_place()}


def provably_gone(owner: dict[str, Any]) -> bool:
    """True only when the process that wrote `owner` can't run any more; False also when nobody can tell."""
    place = _place()
    if not place["boot"] or any(owner.get(key) != value for key, value in place.items()):
        return False
    pid, start = owner.get("pid"), owner.get("start")
    return isinstance(pid, int) and start is not None and _start_time(pid) != start


def _place() -> dict[str, str]:
    """The kernel boot and the PID namespace; empty texts where there is no /proc (macOS)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"boot": "", "namespace": ""}


def _start_time(pid: int) -> str | None:
    """Clock ticks after boot at which the process started (field 22 of /proc/PID/stat); None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]  # the command name, in parentheses, may itself hold anything
