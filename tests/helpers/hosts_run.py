"""Run by Python on the first host of two (two_hosts.py), since a test itself is on neither: preflights, or a run.

preflight FIELDS...      FIELDS: JSON, of a profile; prints a list of problems for each
run FOLDER FIELDS ORDERS starts a run whose stages are probes, under torchrun on each host, and waits for its end;
                         prints how that was, and the events
cancel, kill ...         the same, but once its input is being copied it is cancelled, or its driver is killed
flap, cut ...            the same, but once its ranks are at work the network between them goes; with flap it comes
                         back, and the ranks, which would go on for ever, have done enough
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from nemotron_recipes.executors.docker.executor import DockerExecutor
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import Artifact, JobHandle, Plan
from tests.helpers.executor_harness import events, placement, wait_for, wait_until_over
from tests.helpers.plans import plan_of, probe_stage, submit

EXECUTOR = DockerExecutor()


def plan(folder: str, fields: dict[str, Any], orders: dict[str, Any]) -> Plan:
    """One stage, `first`; orders may have a file, `input`, that it reads."""
    given = {**orders}
    file = given.pop("input", None)
    own = {key: value for key, value in fields.items() if key != "executor"}
    stage = probe_stage("first", placement=placement(EXECUTOR, **own), launcher="torchrun", **given)
    inputs = {"data.path": Artifact("path", "data", uri=file)} if file else {}
    return plan_of(Path(folder), dataclasses.replace(stage, inputs=inputs))


def lose_network(handle: JobHandle, fields: dict[str, Any], back: bool) -> None:
    """By which the ranks are at work together."""
    stage = RunDir(Path(handle.run_dir)).stage("first")
    wait_for(lambda: all((stage.logs(1) / f"told-{rank}.json").exists() for rank in (0, 1)))
    subprocess.run(["ip", "link", "set", "dev", "fast0", "down"], check=True)
    wait_for(lambda: events(handle, "link-down"))
    if back:
        subprocess.run(["ip", "link", "set", "dev", "fast0", "up"], check=True)
        wait_for(lambda: events(handle, "link-up"))
        for root in ("", fields["hosts_folder"]):
            Path(f"{root}{stage.path}/enough").touch()


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "preflight":
        for fields in arguments:
            found = EXECUTOR.preflight(plan("/nowhere/run", json.loads(fields), {}))
            print(json.dumps([[problem.what, problem.fix] for problem in found]))
        return
    folder, fields, orders = arguments[0], json.loads(arguments[1]), json.loads(arguments[2])
    handle, _ = submit(EXECUTOR, plan(folder, fields, orders))
    if what in ("flap", "cut"):
        lose_network(handle, fields, what == "flap")
    if what in ("cancel", "kill"):
        copy = Path(fields["hosts_folder"] + orders["input"])
        wait_for(copy.exists)
    if what == "cancel":
        EXECUTOR.cancel(handle)
    if what == "kill":
        os.kill(handle.native["pid"], signal.SIGKILL)
    state = wait_until_over(EXECUTOR, handle)
    if state == "lost":
        EXECUTOR.settle(handle)
    print(json.dumps([state, *events(handle)]))


if __name__ == "__main__":
    main()
