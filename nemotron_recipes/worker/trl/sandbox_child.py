"""The process that holds a completion's code (sandbox.py). Run by path, in isolated mode: standard library only.

The supervisor reads the request, forks, waits, and kills whatever is left. The program runs in the fork.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import resource
import secrets
import signal
import sys
import time
import types

WALLS = "sandbox_walls.py"
OUTPUT = 64 << 10  # bytes that are kept of what is printed
FILE = 16 << 20  # bytes of the largest file
PROCESSES = 64
POLL = 0.005  # seconds
NEW_USER, NEW_PID, NEW_NET, NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000  # linux/sched.h
ALONE = NEW_USER | NEW_PID | NEW_NET | NEW_IPC
PARENT_DEATH_SIGNAL, SUBREAPER = 1, 36  # linux/prctl.h


def main() -> None:
    """Request on standard input, outcome on standard output."""
    request = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(SUBREAPER, 1)  # what the program leaves behind becomes ours, and is found
    alone = hasattr(libc, "unshare") and libc.unshare(ALONE) == 0
    reader, writer = os.pipe()
    walls_told, walls = os.pipe()
    token = secrets.token_hex(16).encode()
    with open("typed", "w", encoding="utf-8") as typed:
        typed.write(request["typed"])
    # Opened before the program runs: the folder is its own, with all names in it.
    write_end = os.open("printed", os.O_WRONLY | os.O_CREAT)
    read_end = os.open("printed", os.O_RDONLY)
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.close(read_end)
        os.close(walls_told)
        if hasattr(libc, "prctl"):
            libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        _program(request, write_end, writer, token, walls, alone)
    os.close(writer)
    os.close(walls)
    # Namespaces hide other processes; of the network only what has addresses: Unix sockets are files.
    left_open = {*json.loads(os.read(walls_told, 256))} - ({"signals"} if alone else set())
    timed_out = _wait(pid, request["seconds"])
    _kill_the_rest()
    finished = os.read(reader, 64) == token
    output = os.pread(read_end, OUTPUT, 0).decode("utf-8", "replace")
    told = {"finished": finished, "timed_out": timed_out, "output": output, "left_open": sorted(left_open)}
    json.dump(told, sys.stdout)


def _program(request: dict, printed: int, writer: int, token: bytes, walls: int, alone: bool) -> None:
    """Never returns. The token is written after the last test: a program that ends early has not finished. What could
    not be closed goes to `walls` before a line of the program is read."""
    status = 1
    try:
        for number, file in ((0, os.open("typed", os.O_RDONLY)), (1, printed), (2, os.open(os.devnull, os.O_WRONLY))):
            os.dup2(file, number)
            os.close(file)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  the old one has seen the request's end
        os.write(walls, json.dumps(_walls().close(os.getcwd())).encode())
        os.close(walls)
        _limit(request["seconds"], request["memory"], alone and counts_by_namespace(os.uname().release))
        names: dict = {"__name__": "__main__"}
        exec(compile(request["code"], "completion.py", "exec"), names)
        exec(compile(request["tests"], "tests.py", "exec"), names)
        sys.stdout.flush()
        os.write(writer, token)
        status = 0
    except SystemExit as end:
        if not request["tests"] and end.code in (None, 0):  # a script may say that it is done
            sys.stdout.flush()
            os.write(writer, token)
            status = 0
    except BaseException:  # noqa: BLE001, S110  whatever it is: the tests did not pass
        pass
    finally:
        os._exit(status)


def _walls() -> types.ModuleType:
    """sandbox_walls.py beside this file; the program itself finds none of our modules."""
    spec = importlib.util.spec_from_file_location("sandbox_walls", os.path.join(os.path.dirname(__file__), WALLS))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counts_by_namespace(release: str) -> bool:
    """Whether RLIMIT_NPROC counts the processes of a user namespace alone: since Linux 5.14 (kernel/ucount.c)."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= (5, 14)


def _limit(seconds: float, memory: int, processes: bool) -> None:
    """processes: whether to limit their number; where all threads of the user count, honest programs would fail."""
    wanted = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: FILE,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if processes:
        wanted[resource.RLIMIT_NPROC] = PROCESSES
    for kind, most in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (value, value))


def _wait(pid: int, seconds: float) -> bool:
    """Until it ends; killed when its time is up. Whether that was so."""
    until = time.monotonic() + seconds
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(POLL)
    return False


def _kill_the_rest() -> None:
    """Orphans of the program are children of this process now, wherever they have moved to."""
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as listed:
                left = [int(word) for word in listed.read().split()]
        except OSError:  # no such file: not Linux, or a kernel without it
            left = []
        for child in left:
            os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0 if left else os.WNOHANG)
        except ChildProcessError:
            return
        if not left:
            return


if __name__ == "__main__":
    main()
