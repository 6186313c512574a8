"""What a process may not do any more, by its own wish and for good: it needs no rights for that. Standard library only.

Landlock (https://docs.kernel.org/userspace-api/landlock.html) closes the files, and signals to other processes; a
filter of system calls (https://docs.kernel.org/userspace-api/seccomp_filter.html) closes the network and ways around
both. Neither is in Python or in libc, and images bring no library for them: the few calls are made here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable

NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2  # linux/prctl.h, linux/seccomp.h

# linux/landlock.h: the same numbers on every architecture
CREATE, ADD, RESTRICT, VERSION, PATH_BENEATH = 444, 445, 446, 1, 1
EXECUTE, WRITE, READ, READ_FOLDER, TRUNCATE, DEVICE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
OF_A_FILE = EXECUTE | WRITE | READ | TRUNCATE | DEVICE
CONNECT_AND_BIND, OTHERS_SIGNALS_AND_SOCKETS = 0b11, 0b11

PROGRAMS = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")  # and Python's own folders
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

# machine -> (audit architecture of linux/audit.h, numbers of asm/unistd.h). Refused with EPERM, in this order: socket;
# io_uring_setup, which could make one; ptrace, process_vm_readv and _writev, pidfd_getfd, kcmp; keyrings; bpf,
# perf_event_open, userfaultfd; mount, umount2, pivot_root, unshare, setns, open_by_handle_at; memory and queues that
# processes share by number or name: shmget, shmat, semget, msgget, mq_open.
REFUSED = {
    "x86_64": (
        0xC000003E,
        *(41, 425, 101, 310, 311, 438, 312, 248, 249, 250, 321, 298, 323),
        *(165, 166, 155, 272, 308, 304, 29, 30, 64, 68, 240),
    ),
    "aarch64": (
        0xC00000B7,
        *(198, 425, 117, 270, 271, 438, 272, 217, 218, 219, 280, 241, 282),
        *(40, 39, 41, 97, 268, 265, 194, 196, 190, 186, 180),
    ),
}
X32 = 0x40000000  # system calls of another kind on x86-64, with numbers of their own


def close(folder: str, readable: Iterable[str] = ()) -> list[str]:
    """Keep this process, and all that it will start, to `folder`; what Python needs can be read and run as well.

    Returns what stays open because this kernel, or a container's own filter, does not know how: "files", "signals",
    "network".
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl") or libc.prctl(NO_NEW_PRIVILEGES, *_longs(1, 0, 0, 0)) != 0:
        return ["files", "signals", "network"]
    version = _close_files(libc, folder, readable)
    left_open = [name for name, since in (("files", 1), ("signals", 6)) if version < since]
    return left_open + ([] if _close_calls(libc) else ["network"])


def _close_files(libc: ctypes.CDLL, folder: str, readable: Iterable[str]) -> int:
    """The version of Landlock that holds now; 0: none."""
    version = max(0, _call(libc, CREATE, None, 0, VERSION))
    if version == 0:
        return 0
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    numbers = [known, CONNECT_AND_BIND, OTHERS_SIGNALS_AND_SOCKETS][: 1 if version < 4 else 2 if version < 6 else 3]
    wanted = struct.pack(f"={len(numbers)}Q", *numbers)
    rules = _call(libc, CREATE, wanted, len(wanted), 0)
    if rules < 0:
        return 0
    programs = {*PROGRAMS, *readable, sys.prefix, sys.base_prefix, sys.exec_prefix}
    allowed = {**dict.fromkeys(programs, EXECUTE | READ | READ_FOLDER), **dict.fromkeys(DEVICES, READ | WRITE | DEVICE)}
    for path, rights in {**allowed, folder: known}.items():
        _allow(libc, rules, path, rights & known)
    done = _call(libc, RESTRICT, rules, 0)
    os.close(rules)
    return version if done == 0 else 0


def _allow(libc: ctypes.CDLL, rules: int, path: str, rights: int) -> None:
    """What is not there needs no rule."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        rights &= OF_A_FILE
    _call(libc, ADD, rules, PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    os.close(place)


def _close_calls(libc: ctypes.CDLL) -> bool:
    """Whether the filter holds now. A call of another architecture ends the process: its numbers mean other things."""
    if platform.machine() not in REFUSED or sys.maxsize < 1 << 32:
        return False
    architecture, *refused = REFUSED[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h
    kill, error, allow = 0x80000000, 0x00050000 | 1, 0x7FFF0000  # linux/seccomp.h; EPERM
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, X32), (answer, 0, 0, error)]
    for number in refused:
        program += [(equal, 0, 1, number), (answer, 0, 0, error)]
    program.append((answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    return bool(libc.prctl(SECCOMP, *_longs(FILTER), header, *_longs(0, 0)) == 0)


def _call(libc: ctypes.CDLL, number: int, *arguments: int | bytes | None) -> int:
    libc.syscall.restype = ctypes.c_long
    return int(libc.syscall(*_longs(number), *(_longs(a)[0] if isinstance(a, int) else a for a in arguments)))


def _longs(*numbers: int) -> list[ctypes.c_long]:
    """As the kernel reads them: ctypes would leave the upper half of a register as it is."""
    return [ctypes.c_long(number) for number in numbers]
