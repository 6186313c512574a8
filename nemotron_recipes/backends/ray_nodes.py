"""How a stage starts Ray on its nodes, as the plan states it: commands, environment and limits.

The worker fills in what is known only on the nodes, and starts just that: {host} and {port} of the head, {temp} its
folder for sockets and logs, made on each node under one name.
"""

from __future__ import annotations

from nemotron_recipes.spec import Tree

# Ports of Ray's workers, below the kernel's ephemeral ones and beside those of vLLM, NeMo-Gym and the rendezvous: the
# layout of NeMo-RL v0.7.0 (ray.sub, lines 138-153). Without a range Ray takes 10002 to 19999, where vLLM listens too.
WORKER_PORTS = (10002, 11000)
OPEN_FILES = 65535  # Ray's guide to large clusters, and ray.sub
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # newer ones look 30 s for tasks when told to end: there are none
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else, from Ray 2.47 on, each task builds what NeMo-RL builds once
}


def nodes(number: int) -> Tree:
    """`ray` of the worker file. The other ports are taken as they are free, so that runs can share a node."""
    ports = [f"--{bound}-worker-port={port}" for bound, port in zip(("min", "max"), WORKER_PORTS, strict=True)]
    common = [*ports, "--disable-usage-stats", "--block"]
    at_head = ["--node-ip-address={host}", "--port={port}", "--temp-dir={temp}", "--include-dashboard=false"]
    return {
        "nodes": number,
        "open_files": OPEN_FILES,
        "head": ["ray", "start", "--head", *at_head, *common],
        "others": ["ray", "start", "--address={host}:{port}", *common],
    }
