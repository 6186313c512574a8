"""What a stage will take, as far as it can be known before it runs: `StagePlan.estimate`."""

from __future__ import annotations

from pathlib import Path

from nemotron_recipes.planning.history import wall_time
from nemotron_recipes.spec import Placement, Tree


def estimate(config: Tree, fingerprint: str, placement: Placement, runs: Path) -> Tree:
    """{} for a stage that trains nothing, else

    time   processes; seconds and gpu_hours (of one GPU a process), None where nothing has measured it; run, the run
           that did, and smoke, its number of steps where that was a smoke run
    """
    if config["kind"] != "train":
        return {}
    processes = placement.nodes * placement.nproc_per_node
    known = wall_time(runs, fingerprint, config, placement)
    return {
        "time": {
            "processes": processes,
            "seconds": round(known.seconds, 1) if known else None,
            "gpu_hours": round(processes * known.seconds / 3600, 3) if known else None,
            "run": known.run if known else None,
            "smoke": known.smoke if known else 0,
        }
    }
