"""A host name and an /etc/hosts of its own for each node, by Linux namespaces; root is not needed where users may
make user namespaces. The network stays shared: nodes differ by their loopback addresses.
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWUSER = 0x10000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


def enter(host_name: str, hosts_file: Path) -> None:
    """Move this process, which must have one thread, and all that it starts later under `host_name`.

    `hosts_file` lies over /etc/hosts there. OSError when the kernel, or a container's policy, refuses.
    """
    uid, gid = os.geteuid(), os.getegid()
    _unshare(CLONE_NEWNS | CLONE_NEWUTS | (CLONE_NEWUSER if uid else 0))
    if uid:  # inside, the user is itself, not root: Slurm and munge must see the same uid on both sides
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _mount(None, "/", MS_REC | MS_PRIVATE)
    _mount(hosts_file, "/etc/hosts", MS_BIND)
    socket.sethostname(host_name)


def refusal(hosts_file: Path) -> str:
    """Why `enter` does not work here; "" when it does. Tried in a child, as there is no way back."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            enter("probe", hosts_file)
        except OSError as error:
            os.write(writer, str(error).encode()[:1000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def _mount(source: Path | None, target: str, flags: int) -> None:
    what = os.fsencode(source) if source else None
    _check(_libc.mount(what, target.encode(), None, ctypes.c_ulong(flags), None), f"mount on {target}")


def _check(result: int, what: str) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
