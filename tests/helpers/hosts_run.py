"""Run by Python on the first host of two (two_hosts.py), since a test itself is on neither: preflights, or a run.

preflight FIELDS...      FIELDS: JSON, of a profile; prints a list of problems for each
run FOLDER FIELDS ORDERS starts a run whose stages are probes, under torchrun on each host, and waits for its end
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from nemotron_recipes.executors.docker.executor import DockerExecutor
from nemotron_recipes.spec import Plan
from tests.helpers.executor_harness import events, placement, wait_until_over
from tests.helpers.plans import plan_of, probe_stage, submit

EXECUTOR = DockerExecutor()


def plan(folder: str, fields: dict[str, Any], orders: dict[str, Any]) -> Plan:
    """One stage, `first`."""
    del fields["executor"]
    stage = probe_stage("first", placement=placement(EXECUTOR, **fields), launcher="torchrun", **orders)
    return plan_of(Path(folder), stage)


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "preflight":
        for fields in arguments:
            found = EXECUTOR.preflight(plan("/nowhere/run", json.loads(fields), {}))
            print(json.dumps([[problem.what, problem.fix] for problem in found]))
        return
    folder, fields, orders = arguments
    handle, _ = submit(EXECUTOR, plan(folder, json.loads(fields), json.loads(orders)))
    if what == "run":
        print(json.dumps([wait_until_over(EXECUTOR, handle), *events(handle)]))


if __name__ == "__main__":
    main()
