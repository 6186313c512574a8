"""Who owns unfinished work, and what became of that process. Standard library only.

Something is known only of a process of this very kernel boot and PID namespace: it is alive while its PID belongs to a
process that started at the same time. Of other hosts and containers nothing can be proved.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Literal


def this_process() -> dict[str, Any]:
    """The identity of the calling process, as plain data to be written next to its unfinished work."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_time(os.getpid()), **_place()}


def fate(owner: dict[str, Any]) -> Literal["alive", "gone", "unknown"]:
    """What became of the process that wrote `owner`."""
    place, pid, start = _place(), owner.get("pid"), owner.get("start")
    if not place["boot"] or any(owner.get(key) != value for key, value in place.items()):
        return "unknown"
    if not isinstance(pid, int) or start is None:
        return "unknown"
    return "alive" if _start_time(pid) == start else "gone"


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
