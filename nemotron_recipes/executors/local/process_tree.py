"""The processes of a local run, found by a mark in their environment, and stopped without leaving one behind.

Process groups don't suffice: torchrun and TorchX start their children in sessions of their own, and a launcher that
was killed takes its knowledge of them along. Every process of a run inherits NEMOTRON_RUN_ID; that mark stays.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress

import psutil

from nemotron_recipes.rundir import RUN_ID_ENV
from nemotron_recipes.spec import Tree

_POLL_SECONDS = 0.02
_SCAN_SECONDS = 0.2  # a scan reads the environment of every process of this user: a few ms for a hundred
_KILL_SECONDS = 10.0  # a process that survives SIGKILL this long hangs in the kernel (a dead network mount)


def identity(pid: int) -> Tree:
    """What finds that process again, and only it: the native part of a handle."""
    return {"host": socket.gethostname(), "pid": pid, "created": psutil.Process(pid).create_time()}


def members(run_id: str) -> list[psutil.Process]:
    """Live processes of this user that carry the run's mark, other than this process and its ancestors."""
    return [p for p in _others() if _carries(p, run_id)]


def runs_alive() -> set[str]:
    """Ids of the runs that have a live process of this user: one scan for any number of them."""
    return {_mark(process) for process in _others()} - {""}


def find(pid: int, created: float, run_id: str) -> psutil.Process | None:
    """The live process with that id which is really the run's, or None: a recycled pid is somebody else's.

    The mark decides; `created` (seconds since the epoch) only excludes a newer process of the same run, with slack
    because Linux derives it from a boot time that moves when the clock is set.
    """
    try:
        process = psutil.Process(pid)
        return process if _carries(process, run_id) and abs(process.create_time() - created) < 60 else None
    except psutil.NoSuchProcess:
        return None


def ask(process: psutil.Process) -> None:
    """SIGTERM, unless it is gone. psutil sends it to this very process, never to one that took over its id."""
    with suppress(psutil.NoSuchProcess):
        process.terminate()


def wait(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Whether all have died within that time. Not psutil's own wait, which takes the exit code from subprocess."""
    deadline = time.monotonic() + seconds
    while any(_lives(p) for p in processes):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def stop(run_id: str, grace: float, known: Iterable[psutil.Process] = ()) -> list[int]:
    """Stop every process of the run; `known` adds some whose mark may be gone. Returns the pids that would not die.

    SIGTERM goes to the top of each tree alone (torchrun passes it on to its workers; a second one, or one for a
    worker's data loaders, would disturb a checkpoint that is being written). Whatever lives after `grace` seconds gets
    SIGKILL. Returns as soon as nothing is left.
    """
    wanted = {p.pid: p for p in known}
    asked: set[int] = set()
    deadline = time.monotonic() + grace
    while alive := _alive(run_id, wanted):
        if time.monotonic() >= deadline:
            break
        for process in _tops(alive):
            if process.pid not in asked:
                asked.add(process.pid)
                ask(process)
        wait(alive, min(_SCAN_SECONDS, deadline - time.monotonic()))
    deadline = time.monotonic() + _KILL_SECONDS
    while alive := _alive(run_id, wanted):  # again and again: a process may fork while it is being killed
        for process in alive:
            _kill(process)
        wait(alive, _SCAN_SECONDS)
        if time.monotonic() >= deadline:
            return sorted(p.pid for p in alive if _lives(p))
    return []


def _alive(run_id: str, wanted: dict[int, psutil.Process]) -> list[psutil.Process]:
    """Marked processes and the descendants of all seen so far; `wanted` grows, so that orphans stay known."""
    for process in members(run_id):
        wanted[process.pid] = process
    for process in list(wanted.values()):
        try:
            for child in process.children(recursive=True):
                wanted.setdefault(child.pid, child)
        except psutil.Error:
            continue
    return [p for p in wanted.values() if _lives(p)]


def _tops(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those whose parent is not among them."""
    pids = {p.pid for p in processes}
    found = []
    for process in processes:
        try:
            if process.ppid() not in pids:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _others() -> list[psutil.Process]:
    """All processes but this one and its ancestors."""
    own = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    return [p for p in psutil.process_iter() if p.pid not in own]


def _carries(process: psutil.Process, run_id: str) -> bool:
    return _mark(process) == run_id


def _mark(process: psutil.Process) -> str:
    """The id of the run that it belongs to; "" without one."""
    try:
        return process.environ().get(RUN_ID_ENV, "")
    except (psutil.Error, OSError):  # gone, a zombie, or somebody else's
        return ""


def _lives(process: psutil.Process) -> bool:
    """Zombies don't count: they are dead and only wait for their parent."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
