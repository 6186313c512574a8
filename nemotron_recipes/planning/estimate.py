"""What a stage will take, as far as it can be known before it runs: `StagePlan.estimate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nemotron_recipes.backends import Backend, nemo_rl_native
from nemotron_recipes.backends.layout import Layout, layout_problems
from nemotron_recipes.errors import Problem, nearest
from nemotron_recipes.executors.remote import transport
from nemotron_recipes.planning import there
from nemotron_recipes.planning.history import WATCHDOG
from nemotron_recipes.sizing import parameters, policy, search, tables
from nemotron_recipes.sizing.memory import GIB, Memory, trained_parameters
from nemotron_recipes.sizing.rules import model_problems
from nemotron_recipes.sizing.stage import Sized, sized
from nemotron_recipes.spec import Artifact, Placement, Tree


@dataclass(frozen=True)
class Question:
    """A training stage whose size is asked for."""

    config: Tree
    inputs: Mapping[str, Artifact]
    backend: Backend
    nodes: int
    per_node: int
    options: Tree  # the profile's, of which `gpu` and `gpu_memory_gib` say what there is

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node


def estimate(question: Question, fingerprint: str, placement: Placement, runs: Path) -> tuple[Tree, list[Problem]]:
    """(what a training stage takes, why it can't be). The parts, each left out where nothing is known of it:

    model    name, total, active and trained parameters; unverified: fields of its shape that nobody has checked
    memory   parts, needed and margin in bytes on the fullest GPU; capacity of that GPU and the verdict, or None; notes
    disk     bytes of a checkpoint, and of all that are kept at once; least: there may be more, nobody knows how many
    time     processes; seconds and gpu_hours (of one GPU a process), None where nothing has measured it; run, the run
             that did, and smoke, its number of steps where that was a smoke run; limit, seconds that all jobs of the
             run may take together, or None
    """
    config = question.config
    model = question.inputs.get("model.path")
    shape = tables.shape_of(model, config["model"]["arch"]) if model else None
    capacity, problems = capacity_of(question.options)
    told: Tree = {}
    if shape is not None:
        layout = Layout.of(config, question.processes)
        broken = list(model_problems(shape, layout, config["backend"]["name"])) if shape.verified else []
        size = sized(config, shape, question.processes, question.inputs.get("data.path"))
        told["model"] = {
            "name": shape.name,
            "total": parameters.total(shape),
            "active": parameters.active(shape),
            "trained": trained_parameters(size.shape, size.lora) if size else None,
            "unverified": sorted(shape.unverified),
        }
        problems += broken
        if size is not None and not broken and not list(layout_problems(layout)):
            takes = size.memory(layout)
            told["memory"] = _memory(size, takes, capacity)
            told["memory"]["notes"] += policy.notes(config, size.shape, takes, question.per_node)
            if not config["plan"]["allow_oom_risk"]:
                problems += policy.problems(config, size.shape, capacity)
            told["disk"] = _disk(config, size)
            if capacity and told["memory"]["verdict"] == "impossible" and shape.verified:
                problems += _refusal(question, size, takes, capacity)
    known = transport.call(there.wall_time, str(runs), fingerprint, config, asdict(placement))
    if known and known["smoke"] and _passes(config):
        known = None  # how many steps there will be follows from the data
    told["time"] = {
        "processes": question.processes,
        "seconds": round(known["seconds"], 1) if known else None,
        "gpu_hours": round(question.processes * known["seconds"] / 3600, 3) if known else None,
        "run": known["run"] if known else None,
        "smoke": known["smoke"] if known else 0,
        "limit": _limit(question.options),
    }
    return told, problems


def conversion_problems(config: Tree, inputs: Mapping[str, Artifact], processes: int) -> Iterator[Problem]:
    """Rules of the model that the layout of a conversion breaks."""
    model = inputs.get("model.path")
    if config["kind"] != "convert" or config["parallel"] is None or model is None:
        return
    shape = tables.shape_of(model, config["model"]["arch"])
    if shape is not None and shape.verified:
        yield from model_problems(shape, Layout.of(config, processes), config["backend"]["name"])


def smoke_problems(config: Tree, placement: Placement, smoke: int, runs: Path) -> Iterator[Problem]:
    """What is missing where the recipe wants to be seen to fit first. `smoke`: the steps that are asked for now."""
    steps = config["plan"]["requires_smoke"]
    if steps is None:
        return
    if placement.options.get(WATCHDOG) is None:
        what = "this recipe may take more memory than there is: it runs under the memory watchdog alone"
        yield Problem(what, "plan.requires_smoke", f"set {WATCHDOG} in the profile (docs/docker.md)")
    elif not smoke and transport.call(there.smoke_run, str(runs), config, steps, asdict(placement)) is None:
        what = f"no run has shown yet that {steps} steps of this model, adapter and sequence length fit into the memory"
        yield Problem(what, "plan.requires_smoke", f"run the same command with --smoke {steps} first")


def capacity_of(options: Tree) -> tuple[float | None, list[Problem]]:
    """(bytes of one GPU of a profile, None where it names none; a name that is in no table)."""
    given, name = options.get("gpu_memory_gib"), options.get("gpu")
    if name is not None and name not in tables.gpus():
        fix = f"{nearest(name, tables.gpus())} Otherwise set gpu_memory_gib"
        return None, [Problem(f"the memory of a GPU '{name}' is not known", "run.gpu", fix)]
    gib = given or (tables.gpus()[name] if name else None)
    return gib * GIB if gib else None, []


def _limit(options: Tree) -> int | None:
    """Seconds that a stage's jobs may take: the first one, and each that goes back into the queue."""
    if not options.get("time"):
        return None
    from nemotron_recipes.executors.slurm.profile import limit_seconds

    limit = limit_seconds(options["time"])
    return limit * (1 + options.get("max_requeues", 0)) if limit else None


def _memory(size: Sized, takes: Memory, capacity: float | None) -> Tree:
    notes = []
    verdict = takes.verdict(capacity) if capacity else None
    if not size.sequence:
        notes.append("without activations: how long sequences are is not known before the data")
        verdict = verdict if verdict == "impossible" else None
    parts = {name: round(value) for name, value in asdict(takes).items()}
    return {
        "margin": parts.pop("margin"),
        "parts": parts,
        "needed": round(takes.needed),
        "capacity": round(capacity) if capacity else None,
        "verdict": verdict,
        "notes": notes,
    }


def _disk(config: Tree, size: Sized) -> Tree:
    """A new checkpoint is whole before the oldest one goes; saving at the end alone keeps one."""
    train, checkpoint = config["train"], config["checkpoint"]
    saves = -(-train["train_iters"] // (checkpoint["save_interval"] or train["train_iters"]))
    least = _passes(config) and checkpoint["keep"] > 1
    number = 2 if least else min(saves, checkpoint["keep"] + 1)
    return {"checkpoint": size.checkpoint_bytes, "kept": size.checkpoint_bytes * number, "least": least}


def _passes(config: Tree) -> bool:
    """Whether the data may end the training before train.train_iters does."""
    return config["backend"]["name"] == "nemo_rl" and nemo_rl_native.passes_of(config) is not None


def _refusal(question: Question, size: Sized, takes: Memory, capacity: float) -> list[Problem]:
    if question.config["plan"]["allow_oom_risk"]:
        return []
    what = (
        f"{size.shape.name} on {question.processes} GPU(s) takes at least {takes.certain / GIB:.1f} GiB of the fullest"
        f" one, which has {capacity / GIB:.0f}"
    )
    found = search.smallest(question.config, question.backend, size, question.nodes, question.per_node, capacity)
    if found is None:
        fix = "no layout that was tried would do: train adapters (peft), or with a backend that shares out the model"
    else:
        nodes, per_node, best = found
        place = {"run.nodes": (nodes, question.nodes), "run.nproc_per_node": (per_node, question.per_node)}
        changed = [f"{key}={then}" for key, (then, now) in place.items() if then != now]
        changed += [text for text in best.overrides if text not in _now(question)]
        fix = f"the smallest that would: {' '.join(changed)} ({best.memory.needed / GIB:.1f} GiB)"
    return [Problem(what, "plan", f"{fix}; plan.allow_oom_risk=true runs it as it is")]


def _now(question: Question) -> list[str]:
    parallel = question.config["parallel"] or {}
    return [f"parallel.{key}={str(value).lower()}" for key, value in parallel.items()]
