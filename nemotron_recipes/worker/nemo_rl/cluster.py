"""A Ray cluster on the nodes of one attempt: rank 0 starts the head, the first rank of every other node joins it.

They meet through files in the stage's folder, which all nodes see: `ray/attempt-N/head` holds the head's address and
temporary folder, `ray/attempt-N/ended` says that all may go, `ray/attempt-N/logs/RANK-HOST` are Ray's own logs of each
node. Ray itself is only called by its command line, which the Plan states.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.spec import Tree
from nemotron_recipes.worker.context import Context

POLL = 1.0  # seconds between looks at the meeting folder and at what was started
MEETING = 600.0  # seconds for all nodes to join
GRACE = 30.0  # seconds for Ray to end its processes
# torchrun's word for this process; what Ray starts gets its own.
_OURS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL")
_HEADS = "head"  # in Ray's folder on the disk of the head
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


@dataclass(frozen=True)
class Place:
    """Where the head is: what is filled into the Plan's commands."""

    host: str
    port: int
    temp: str

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Head:
    """A cluster that is up."""

    address: str
    node: subprocess.Popen[bytes]

    def require(self) -> None:
        """JobFailed: Ray's head has ended, and with it the cluster."""
        if self.node.poll() is not None:
            host = socket.gethostname()
            raise JobFailed(f"Ray's head on {host} ended with {self.node.returncode}; its logs say more")


def environment(environ: Mapping[str, str], address: str = "") -> dict[str, str]:
    """What Ray and NeMo-RL get: ours without torchrun's, with the address of the cluster."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_OURS)}
    return {**kept, **({"RAY_ADDRESS": address} if address else {})}


@contextmanager
def head(context: Context, ray: Tree, environ: Mapping[str, str] = os.environ) -> Iterator[Head]:
    """Rank 0: a cluster of `ray["nodes"]` nodes, for as long as the block lasts. JobFailed: it did not come up."""
    meeting = _meeting(context)
    shutil.rmtree(meeting, ignore_errors=True)  # torchrun restarted this attempt
    meeting.mkdir(parents=True)
    # As short as Ray's own default: the paths of its sockets must not be longer than 107 bytes.
    temp = tempfile.mkdtemp(prefix="ray-", dir=environ.get("RAY_TMPDIR", "/tmp"))
    (Path(temp) / _HEADS).touch()
    place = Place(_host(environ, ray["nodes"]), _free_port(), temp)
    with _node(ray["head"], ray, place, context, environ) as node:
        up = Head(place.address, node)
        try:
            write_atomic(meeting / "head", json.dumps(asdict(place)))
            _wait_for_all(up, ray["nodes"], environ)
            context.event("ray-cluster", address=place.address, nodes=ray["nodes"])
            yield up
        finally:
            write_atomic(meeting / "ended", "")


def join(context: Context, ray: Tree, environ: Mapping[str, str] = os.environ) -> None:
    """First rank of another node: a node of the cluster until rank 0 says that all may go."""
    meeting = _meeting(context)
    end = time.monotonic() + MEETING
    while not (meeting / "head").is_file():
        if context.stop_requested():
            return
        if time.monotonic() > end:
            raise JobFailed(f"rank 0 has started no Ray head within {MEETING:.0f} s: {meeting}")
        time.sleep(POLL)
    place = Place(**json.loads((meeting / "head").read_text(encoding="utf-8")))
    with _node(ray["others"], ray, place, context, environ) as node:
        while not (meeting / "ended").is_file() and not context.stop_requested():
            if node.poll() is not None:
                host = socket.gethostname()
                raise JobFailed(f"Ray ended on {host} with {node.returncode}; its logs say more: {_logs(context)}")
            time.sleep(POLL)


def _wait_for_all(up: Head, nodes: int, environ: Mapping[str, str]) -> None:
    """JobFailed: the head ended, or not all nodes have joined within MEETING seconds."""
    count = [sys.executable, "-c", _COUNT, up.address, str(nodes), str(MEETING)]
    with tempfile.TemporaryFile("w+") as said:
        counting = subprocess.Popen(count, env=environment(environ, up.address), stderr=said)
        try:
            while counting.poll() is None:
                up.require()
                time.sleep(POLL / 10)
        finally:
            counting.kill()
            counting.wait()
        if counting.returncode:
            said.seek(0)
            lines = said.read().strip().splitlines() or ["without a word"]
            raise JobFailed(f"the Ray cluster did not come up: {lines[-1]}")


@contextmanager
def _node(
    command: list[str], ray: Tree, place: Place, context: Context, environ: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start --block`, which takes all that it has started with it when it is asked to end.

    Never `ray stop`: that ends every Ray of this user on the machine.
    """
    filled = [_program(), *(word.format(**asdict(place)) for word in command[1:])]
    _open_files(ray["open_files"])
    node = subprocess.Popen(filled, env=environment(environ))
    try:
        yield node
    finally:
        node.terminate()
        try:
            node.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
        _keep_logs(Path(place.temp), _logs(context), mine=context.is_main)


def _keep_logs(temp: Path, target: Path, mine: bool) -> None:
    """Ray's own logs of this node, which lie on its disk, go to the stage's folder; what is left there goes away."""
    try:
        for logs in temp.glob("session_[0-9]*/logs"):
            shutil.copytree(logs, target, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    except OSError as error:  # a full disk must not hide how the stage ended
        print(f"warning: not all logs of Ray were kept: {error}", file=sys.stderr)
    if mine or not (temp / _HEADS).exists():  # nodes that share a machine share it, and the head may still be writing
        shutil.rmtree(temp, ignore_errors=True)


def _open_files(wanted: int) -> None:
    """For this process and those it starts: up to `wanted` open files, where the machine allows so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        print(f"warning: {allowed} open files are allowed here, Ray wants {wanted}", file=sys.stderr)


def _meeting(context: Context) -> Path:
    return context.dir.path / "ray" / f"attempt-{context.attempt}"


def _logs(context: Context) -> Path:
    return _meeting(context) / "logs" / f"{context.rank}-{socket.gethostname()}"


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
