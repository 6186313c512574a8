"""What a stage will take, for people."""

from __future__ import annotations

from nemotron_recipes.cli.text import duration, size
from nemotron_recipes.spec import Tree

GIB = 1 << 30
VERDICTS = {
    "fits": "fits",
    "tight": "TIGHT: less than the margin is left",
    "doubtful": "DOUBTFUL: by these formulas it is too much",
    "impossible": "TOO MUCH",
}


def estimate_lines(estimate: Tree) -> list[str]:
    """Lines of a plan's description; none for a stage that trains nothing."""
    lines = []
    if model := estimate.get("model"):
        lines.append(f"  model        {_model(model)}")
    if memory := estimate.get("memory"):
        lines += [f"  {'memory' if not number else '':<12} {line}" for number, line in enumerate(_memory(memory))]
    if disk := estimate.get("disk"):
        kept = f"{'at least ' if disk['least'] else ''}{size(disk['kept'])} while it runs"
        lines.append(f"  disk         {size(disk['checkpoint'])} a checkpoint, {kept}")
    if estimate:
        lines.append(f"  time         {time_text(estimate['time'])}")
    return lines


def gib(count: float) -> str:
    """Memory for people: `65.5 GiB`, `12.3 MiB`."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / GIB * 1024:.1f} MiB"


def time_text(time: Tree) -> str:
    """How long, how many GPU-hours, and who says so."""
    number, limit = time["processes"], time["limit"]
    if time["seconds"] is None:
        most = f", at most {number * limit / 3600:.4g} within its limit of {duration(limit)}" if limit else ""
        known = "how long it takes is not known yet: --smoke 10 measures it"
        return f"{number} GPU-hours an hour, one GPU a process{most}; {known}"
    source = f"smoke run {time['run']}, {time['smoke']} steps" if time["smoke"] else f"run {time['run']}"
    hours = f"{time['gpu_hours']:.4g} GPU-hours with one GPU a process"
    late = f"; LONGER than its limit of {duration(limit)}" if limit and time["seconds"] > limit else ""
    return f"about {duration(time['seconds'])} on {number} process(es), {hours} (from {source}){late}"


def _model(model: Tree) -> str:
    trained = ""
    if model["trained"] is not None and model["trained"] < model["total"]:
        trained = f", {_count(model['trained'])} trained"
    unverified = f"; not verified: {', '.join(model['unverified'])}" if model["unverified"] else ""
    return (
        f"{model['name']}: {_count(model['total'])} parameters, {_count(model['active'])} active a token"
        f"{trained}{unverified}"
    )


def _memory(memory: Tree) -> list[str]:
    needed, margin, capacity = memory["needed"], memory["margin"], memory["capacity"]
    whole = f"{gib(needed)} on the fullest GPU"
    if capacity:
        whole += f", which has {gib(capacity)}: {VERDICTS.get(memory['verdict'], 'not judged')}"
    else:
        whole += "; how large it is the profile does not say (gpu)"
    parts = ", ".join(f"{name} {gib(value)}" for name, value in memory["parts"].items() if value)
    return [whole, f"{parts}; margin {gib(margin)}", *memory["notes"]]


def _count(number: int) -> str:
    """Parameters: `31.6B`, `878.9M`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{letter}"
    return str(number)
