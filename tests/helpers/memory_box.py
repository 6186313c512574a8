"""Run under `unshare --mount`: a run that eats memory, on a machine that has 3 GiB, as /proc/meminfo says there.

What is left follows from what the run's processes really hold, and not from what else goes on here. Prints how the run
ended, and its events.

memory_box FOLDER EXECUTOR
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from nemotron_recipes.executors import get_executor
from nemotron_recipes.executors.local import process_tree
from tests.helpers.executor_harness import events, placement, wait_until_over
from tests.helpers.plans import plan_of, probe_stage, submit

TOTAL_KIB = 3 << 20
FIELDS = {"memory_stop_gib": 2.0, "grace_seconds": 30.0}
_SECONDS = 0.02


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    meminfo = folder / "meminfo"
    meminfo.write_text(_text(TOTAL_KIB))
    subprocess.run(["mount", "--bind", str(meminfo), "/proc/meminfo"], check=True)
    executor = get_executor(name)
    stage = probe_stage("first", placement=placement(executor, **FIELDS))
    stage = replace(stage, launch=replace(stage.launch, module="tests.helpers.memory_eater"))
    plan, over = plan_of(folder / "run", stage), threading.Event()
    threading.Thread(target=_follow, args=(meminfo, plan.id, over), daemon=True).start()
    handle, _ = submit(executor, plan)
    state = wait_until_over(executor, handle)
    over.set()
    print(json.dumps([state, *events(handle)]))


def _follow(meminfo: Path, run: str, over: threading.Event) -> None:
    while not over.wait(_SECONDS):
        held = 0
        for process in process_tree.members(run):
            with suppress(psutil.Error):
                if any("memory_eater" in word for word in process.cmdline()):
                    held += process.memory_info().rss
        with open(meminfo, "r+") as file:  # in place: it is mounted; and always as long
            file.write(_text(max(0, TOTAL_KIB - (held >> 10))))


def _text(available: int) -> str:
    fields = {"MemTotal": TOTAL_KIB, "MemFree": available, "MemAvailable": available}
    return "".join(f"{name}: {kib:12d} kB\n" for name, kib in fields.items())


if __name__ == "__main__":
    main()
