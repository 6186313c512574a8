"""What the executor tests run in place of a worker: it says what it received, then ends as it is told.

Its orders stand in `files/probe.json` of the folder it starts in, so that the arguments are free for hostile text.
Values of the environment are written as digests only: no secret may lie in the run folder. Standard library and
nemotron_recipes.rundir only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nemotron_recipes.rundir import ATTEMPT_ENV, DEADLINE_ENV, RUN_ID_ENV, StageDir, write_record


def main() -> int:
    orders = json.loads((Path.cwd() / "files" / "probe.json").read_text())
    attempt = int(os.environ[ATTEMPT_ENV])
    if orders["attempts"] and attempt > orders["attempts"]:  # only the first ones are to go wrong
        orders |= {"exit": 0, "signal": 0, "sleep": 0, "record": "succeeded"}
    rank = os.environ.get("RANK", "0")
    children = [
        subprocess.Popen([sys.executable, "-c", _CHILD], start_new_session=True) for _ in range(orders["children"])
    ]
    if orders["deaf"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    received = {
        "argv": sys.argv[1:],
        "cwd": os.getcwd(),
        "env": {name: digest(value) for name, value in os.environ.items()},
        "files": {p.name: digest(p.read_bytes()) for p in (Path.cwd() / "files").iterdir()},
        "pid": os.getpid(),
        "attempt": attempt,
        "deadline": os.environ.get(DEADLINE_ENV),
        "children": [child.pid for child in children],
    }
    partial = Path(f"received-{rank}.tmp")
    partial.write_text(json.dumps(received))
    partial.rename(f"received-{rank}.json")
    if os.environ.get("PET_NODE_RANK"):  # of several hosts' folders only what ranks always write comes back
        told = StageDir(Path.cwd()).logs(attempt) / f"told-{rank}.json"
        told.write_text(json.dumps({name: os.environ.get(name) for name in _TOLD}))
    print("probe: on stdout", flush=True)
    print("probe: on stderr", file=sys.stderr, flush=True)
    if orders["lines"]:
        log = StageDir(Path.cwd()).log(attempt, int(rank))
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", buffering=1) as lines:
            for number in itertools.count() if orders["lines"] < 0 else range(orders["lines"]):
                if Path("enough").exists():
                    break
                lines.write(f"line {number} of rank {rank}\n")
                time.sleep(0.2)
    time.sleep(orders["sleep"])
    if orders["failing_rank"] != rank and (orders["signal"] or orders["exit"]):
        time.sleep(120)  # until torchrun stops it
    if orders["signal"]:
        os.kill(os.getpid(), orders["signal"])
    if orders["record"] and rank == "0":
        record = {
            "run": os.environ[RUN_ID_ENV],
            "stage": Path.cwd().name,
            "attempt": attempt,
            "fingerprint": orders["fingerprint"],
            "state": orders["record"],
            "exit_code": orders["exit"],
        }
        write_record(StageDir(Path.cwd()), record)
    return int(orders["exit"])


_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES", "NODE")


def digest(value: str | bytes) -> str:
    data = os.fsencode(value) if isinstance(value, str) else value
    return hashlib.sha256(data).hexdigest()


_CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"

if __name__ == "__main__":
    sys.exit(main())
