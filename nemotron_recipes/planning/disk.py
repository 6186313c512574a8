"""Whether the checkpoints that a run will keep have room."""

from __future__ import annotations

from collections.abc import Iterator

from nemotron_recipes.errors import Problem
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.spec import Plan

GB = 1e9


def disk_problems(plan: Plan) -> Iterator[Problem]:
    """What the stages that run will write, against what is free below the run folder. Quotas are not looked at."""
    needs = {stage.name: stage.estimate.get("disk") for stage in plan.stages if stage.reused is None}
    kept = sum(disk["kept"] for disk in needs.values() if disk)
    place, free = transport.call(there.room, plan.run_dir)
    if kept > free:
        names = ", ".join(name for name, disk in needs.items() if disk)
        largest = max(disk["checkpoint"] for disk in needs.values() if disk)
        what = (
            f"{names}: checkpoints take {kept / GB:.1f} GB ({largest / GB:.1f} GB each),"
            f" but {free / GB:.1f} GB are free below {place}"
        )
        where = "remote_job_dir" if transport.current().name else "[artifacts] output"
        yield Problem(what, where, "name a folder with more room, or keep fewer: checkpoint.keep=1")
