"""What a stage will take, for people."""

from __future__ import annotations

from nemotron_recipes.cli.text import duration
from nemotron_recipes.spec import Tree


def estimate_lines(estimate: Tree) -> list[str]:
    """Lines of a plan's description; none for a stage that trains nothing."""
    if not estimate:
        return []
    return [f"  time         {time_text(estimate['time'])}"]


def time_text(time: Tree) -> str:
    """How long, how many GPU-hours, and who says so."""
    number = time["processes"]
    if time["seconds"] is None:
        return f"{number} GPU-hours an hour, one GPU a process; how long is not known yet: --smoke 10 measures it"
    source = f"smoke run {time['run']}, {time['smoke']} steps" if time["smoke"] else f"run {time['run']}"
    hours = f"{time['gpu_hours']:.4g} GPU-hours with one GPU a process"
    return f"about {duration(time['seconds'])} on {number} process(es), {hours} (from {source})"
