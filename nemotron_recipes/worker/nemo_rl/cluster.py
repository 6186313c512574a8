"""A Ray cluster on the nodes of one attempt: rank 0 starts the head, the first rank of every other node joins it.

They meet through files in the stage's folder, which all nodes see: `ray/attempt-N/head` holds the head's address,
`ray/attempt-N/ended` says that all may go. Ray itself is only called by its command line.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.worker.context import Context

POLL = 1.0  # seconds between looks at the meeting folder and at what was started
MEETING = 600.0  # seconds for all nodes to join
GRACE = 30.0  # seconds for Ray to end its processes
# torchrun's word for this process; what Ray starts gets its own.
_OURS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL")
_COUNT = """
import sys, time, ray
address, wanted, end = sys.argv[1], int(sys.argv[2]), time.time() + float(sys.argv[3])
found = 0
while found < wanted:
    try:
        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
        found = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:  # the head is not listening yet
        pass
    if found < wanted:
        time.sleep(1) if time.time() < end else sys.exit(f"{found} of {wanted} node(s) have joined")
"""


def environment(environ: Mapping[str, str], address: str = "") -> dict[str, str]:
    """What Ray and NeMo-RL get: ours without torchrun's, with the address of the cluster."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_OURS)}
    return {**kept, **({"RAY_ADDRESS": address} if address else {})}


@contextmanager
def head(context: Context, nodes: int, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Rank 0: the address of a cluster of that many nodes, for as long as it lasts. JobFailed: it did not come up."""
    meeting = _meeting(context)
    shutil.rmtree(meeting, ignore_errors=True)  # torchrun restarted this attempt
    meeting.mkdir(parents=True)
    host = _host(environ, nodes)
    address = f"{host}:{_free_port()}"
    named = [f"--node-ip-address={host}", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
    with _node(["--head", *named], environ):
        try:
            write_atomic(meeting / "head", address)
            count = [sys.executable, "-c", _COUNT, address, str(nodes), str(MEETING)]
            told = environment(environ, address)
            done = subprocess.run(count, env=told, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["without a word"]
                raise JobFailed(f"the Ray cluster did not come up: {said[-1]}")
            context.event("ray-cluster", address=address, nodes=nodes)
            yield address
        finally:
            write_atomic(meeting / "ended", "")


def join(context: Context, environ: Mapping[str, str] = os.environ) -> None:
    """First rank of another node: a node of the cluster until rank 0 says that all may go."""
    meeting = _meeting(context)
    end = time.monotonic() + MEETING
    while not (meeting / "head").is_file():
        if context.stop_requested():
            return
        if time.monotonic() > end:
            raise JobFailed(f"rank 0 has started no Ray head within {MEETING:.0f} s: {meeting}")
        time.sleep(POLL)
    address = (meeting / "head").read_text(encoding="utf-8").strip()
    with _node([f"--address={address}"], environ) as node:
        while not (meeting / "ended").is_file() and not context.stop_requested():
            if node.poll() is not None:
                host = socket.gethostname()
                raise JobFailed(f"Ray ended on {host} with {node.returncode}; this rank's log says more")
            time.sleep(POLL)


@contextmanager
def _node(arguments: list[str], environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start --block`, which takes all that it has started with it when it is asked to end.

    Never `ray stop`: that ends every Ray of this user on the machine.
    """
    argv = [_program(), "start", *arguments, "--disable-usage-stats", "--block"]
    node = subprocess.Popen(argv, env=environment(environ))
    try:
        yield node
    finally:
        node.terminate()
        try:
            node.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()


def _meeting(context: Context) -> Path:
    return context.dir.path / "ray" / f"attempt-{context.attempt}"


def _host(environ: Mapping[str, str], nodes: int) -> str:
    """This node's address as the others see it: torchrun's master is rank 0's node."""
    return "127.0.0.1" if nodes == 1 else socket.gethostbyname(environ.get("MASTER_ADDR") or socket.gethostname())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _program() -> str:
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.is_file() else shutil.which("ray")
    if found is None:
        raise UserError(Problem("there is no ray command here", sys.executable, "use an image of NeMo-RL"))
    return found
