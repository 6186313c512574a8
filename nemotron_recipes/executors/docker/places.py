"""Where the containers of a submitted run are: its hosts, and the daemon of each."""

from __future__ import annotations

from pathlib import Path

from nemotron_recipes.executors.docker.control import Docker, endpoint
from nemotron_recipes.executors.hosts import network
from nemotron_recipes.executors.hosts.network import Host
from nemotron_recipes.rundir import RunDir, read_jsonl
from nemotron_recipes.spec import JobHandle

LEFT, CLEARED = "left-behind", "cleared"  # events: a host was away at the end; its container has been removed since


def hosts_of(handle: JobHandle) -> list[Host]:
    """The run's, the first one first; connects to none."""
    return network.from_tree(handle.native["host"], handle.native.get("hosts", []))


def daemon_of(host: Host, handle: JobHandle) -> Docker:
    """The one that the run's driver uses there. Unreachable."""
    if host.node == 0:
        return Docker(handle.native["docker_host"])
    return daemon_at(host, handle.native["hosts"][host.node - 1]["docker_host"])


def daemon_at(host: Host, given: str | None) -> Docker:
    """The daemon `given`, or the one that docker's command finds there. Unreachable."""
    return Docker(endpoint(given, host.where), host.where)


def left_on(handle: JobHandle) -> list[str]:
    """Names of hosts that were away when the run ended, and where nobody has looked since."""
    found: dict[str, None] = {}
    for event in read_jsonl(RunDir(Path(handle.run_dir)).events):
        if event["event"] == LEFT:
            found[event["host"]] = None
        elif event["event"] == CLEARED:
            found.pop(event["host"], None)
    return [*found]
