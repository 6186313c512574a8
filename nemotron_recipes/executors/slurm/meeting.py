"""Where the nodes of an attempt meet: a port of the first one, chosen and held there, and told through the run folder.

The launcher of the first node keeps the port bound, but does not listen: torch's store, which sets SO_REUSEADDR, gets
it all the same, and the launcher of another job on that node, whoever owns it, takes another one.
Standard library only.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Mapping

from nemotron_recipes.executors.slurm import files
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import StageDir, read_json

# Above the range from which Linux takes the ports of outgoing connections (net.ipv4.ip_local_port_range).
FIRST_PORT, PORTS = 61000, 4500
TRIES = 200
WAIT_SECONDS = 180.0  # a network file system may show a new file a minute late


class NoMeeting(Exception):
    """The nodes can't meet; the message says why."""


def hold_port(stage: StageDir, attempt: int, job: str) -> tuple[socket.socket, int]:
    """On the first node: a free port, told to the others; it is held for as long as the socket lives.

    Each job begins its search elsewhere, so mostly it takes the first. NoMeeting when TRIES ports in a row are taken.
    """
    start = int(re.sub(r"\D", "", job)) % PORTS
    for number in range(TRIES):
        port = FIRST_PORT + (start + number) % PORTS
        try:
            held = _bound(port)
        except OSError:
            continue
        write_atomic(files.meeting(stage, attempt), json.dumps({"job": job, "port": port}))
        return held, port
    last = FIRST_PORT + (start + TRIES - 1) % PORTS
    raise NoMeeting(f"no port is free for the nodes to meet at: {FIRST_PORT + start} to {last} are all taken")


def told_port(stage: StageDir, attempt: int, job: str, stopping: Callable[[], bool]) -> int:
    """On another node: the port that the first one holds. NoMeeting: none was told in time, or this node is to stop."""
    path, deadline = files.meeting(stage, attempt), time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline and not stopping():
        told: Mapping[str, object] = read_json(path) or {}
        if told.get("job") == job and isinstance(told.get("port"), int):
            return int(str(told["port"]))
        time.sleep(0.1)
    raise NoMeeting(f"the first node told no port to meet at ({path}): do all nodes see one and the same run folder?")


def _bound(port: int) -> socket.socket:
    """Bound on all addresses, so that nobody has it on any; closed with the process."""
    both = socket.has_dualstack_ipv6()
    held = socket.socket(socket.AF_INET6 if both else socket.AF_INET)
    try:
        if both:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        held.bind(("", port))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only now: before, it would share the port as well
    except OSError:
        held.close()
        raise
    return held
