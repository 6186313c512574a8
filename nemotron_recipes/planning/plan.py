"""Request -> Plan. One path for a single stage and for a pipe: a pipe is a Plan with several stages.

Everything is read, nothing is written. All problems of all stages are reported together.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.store import Store, name_problems
from nemotron_recipes.backends import get_backend
from nemotron_recipes.config.catalog import Catalog
from nemotron_recipes.config.compose import Composed, base_tree, compose
from nemotron_recipes.config.profiles import Environment
from nemotron_recipes.config.schema import KINDS
from nemotron_recipes.config.tree import flatten
from nemotron_recipes.errors import SHOWN, Problem, UserError, nearest
from nemotron_recipes.executors import get_executor
from nemotron_recipes.executors.remote import transport
from nemotron_recipes.planning import there
from nemotron_recipes.planning.code import describe_code, python_path
from nemotron_recipes.planning.estimate import Question, conversion_problems, estimate, smoke_problems
from nemotron_recipes.planning.placement import not_heard, placement_of
from nemotron_recipes.planning.resolve import Resolver
from nemotron_recipes.planning.smoke import length, shortened
from nemotron_recipes.planning.validate import defaults_of, validate
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import (
    Artifact,
    Code,
    Origin,
    Output,
    Plan,
    Producer,
    Request,
    StagePlan,
    StageSpec,
    Tree,
    sha256_text,
)

# Keys that change where, how often or under which name, but not what comes out.
NOT_IDENTITY = (
    "data.workers",
    *("run", "outputs", "code", "plan"),
    *("train.resume", "train.log_interval"),
    *("checkpoint.save_interval", "checkpoint.keep"),
)


@dataclass(frozen=True)
class Step:
    """One stage of a request before it is planned."""

    name: str
    family: str
    words: tuple[str, ...]
    config_name: str
    overrides: tuple[str, ...]
    typed: Mapping[str, str] = field(default_factory=dict)  # override -> as the user typed it, where that differs


def make_plan(request: Request, catalog: Catalog, environment: Environment) -> Plan:
    """Plan every stage of a request. UserError carries every problem found."""
    config_path = catalog.require(request.family, request.words, request.config)
    profile = (request.profile, environment.profile(request.profile)) if request.profile else None
    plan_id = f"{request.family}-{request.stage}-{request.config}-{secrets.token_hex(4)}"
    run_dir = environment.output / "runs" / plan_id
    store = Store(environment.store)
    resolver = Resolver(store, Path(request.cwd), catalog.makers, request.offline)
    code = describe_code()

    steps, problems = _steps(request, catalog, config_path)
    reuse = not request.force
    stages: list[StagePlan] = []
    planner = _StagePlanner(request, catalog, resolver, code, plan_id, run_dir, environment.output / "runs")
    for step in steps:
        outputs: Tree = {}
        stage: StagePlan | None = None
        try:
            path = catalog.require(step.family, step.words, step.config_name)
            composed = compose(catalog, path, step.overrides, profile).as_typed(step.typed)
            outputs = composed.tree.get("outputs") or {}
            alone = len(steps) == 1 and composed.tree.get("kind") == "train"  # who asks to train, wants to train
            stage = planner.plan(step, composed, path, reuse=reuse and not alone)
            stages.append(stage)
        except UserError as error:
            prefix = f"{step.name}: " if len(steps) > 1 else ""
            problems += [Problem(prefix + p.what, p.where, p.fix) for p in error.problems]
        # What a refused stage would have made counts as promised: its successors have no problem of their own.
        for slot, name in outputs.items() if isinstance(outputs, dict) else ():
            producer = Producer(stage.fingerprint if stage else "", plan_id, step.name, slot)
            pending = Artifact("pending", slot, str(name), producer=producer)
            resolver.produced[str(name)] = (stage.reused if stage else None) or pending
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return Plan(
        id=plan_id,
        family=request.family,
        title=f"{request.family} {' '.join(request.words)} -c {request.config}"
        + (f" --smoke {request.smoke}" if request.smoke else ""),
        request=request,
        stages=tuple(stages),
        code=code,
        run_dir=str(run_dir),
        store=str(environment.store),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        wandb=dict(environment.wandb),
    )


def fingerprint(config: Tree, inputs: dict[str, Artifact], code: Code) -> str:
    """What a stage computes: its config without placement and names, its inputs' identities, the code."""
    identity = copy.deepcopy(config)
    shared_out = ("parallel",) if config["kind"] == "convert" else ()  # the same weights come out
    for key in (*NOT_IDENTITY, *shared_out):
        _drop(identity, key.split("."))
    for key, artifact in inputs.items():
        _put(identity, key.split("."), artifact.identity)
    text = json.dumps({"config": identity, "code": code.digest}, sort_keys=True, ensure_ascii=True)
    return sha256_text(text)


def _steps(request: Request, catalog: Catalog, config_path: str) -> tuple[list[Step], list[Problem]]:
    """The stages of a request with the overrides of each, and the overrides that belong to none."""
    first = compose(catalog, config_path) if request.words[-1] == "pipe" else None
    if first is None or first.tree.get("kind") != "pipe":
        return [Step(request.stage, request.family, request.words, request.config, request.overrides)], []
    checked, problems = validate(first, config_path)
    if problems:
        raise UserError(*problems)
    steps: list[Step] = []
    for entry in checked["stages"]:
        words = tuple(entry["stage"].split())
        name = "-".join(words)
        if any(step.name == name for step in steps):
            name = f"{name}-{entry['config']}"
        steps.append(Step(name, entry["family"] or request.family, words, entry["config"], ()))
    return _shared_out(steps, request.overrides)


def _shared_out(steps: list[Step], overrides: Sequence[str]) -> tuple[list[Step], list[Problem]]:
    """Give each override of a pipe to its stage (`sft.train.train_iters=5`); `run.*` goes to all of them."""
    names = [step.name for step in steps]
    given: dict[str, dict[str, str]] = {name: {} for name in names}  # override -> as typed
    problems = []
    for text in overrides:
        mark = text[: len(text) - len(text.lstrip("+~"))]
        stage, dot, rest = text[len(mark) :].partition(".")
        if stage in given and dot:
            given[stage][mark + rest] = text
        elif stage == "run" and dot:
            for name in names:
                given[name][text] = text
        elif "=" not in text and not mark:
            problems.append(Problem(f"can't read override {text!r}", "command line", "overrides are STAGE.key=value"))
        else:
            near = nearest(stage, names)
            fix = near if near.startswith("did") else f"name the stage: {names[-1]}.{text} (stages: {', '.join(names)})"
            problems.append(Problem(f"override {text!r} names no stage of this pipe", "command line", fix))
    return [replace(s, overrides=tuple(given[s.name]), typed=given[s.name]) for s in steps], problems


@dataclass(frozen=True)
class _StagePlanner:
    request: Request
    catalog: Catalog
    resolver: Resolver
    code: Code
    plan_id: str
    run_dir: Path
    runs: Path

    def plan(self, step: Step, composed: Composed, config_path: str, reuse: bool) -> StagePlan:
        """UserError: everything that is wrong with one stage."""
        config, problems = validate(composed, config_path, tuple(kind for kind in KINDS if kind != "pipe"))
        if problems:
            raise UserError(*problems)
        config, blend = _with_blend(config, composed, self.resolver.cwd)
        inputs, problems = self.resolver.resolve_all(config, composed.origin)
        whole = config
        smoke: Tree = {}
        if self.request.smoke:
            config, smoke = shortened(config, self.request.smoke)
        backend = get_backend(config["backend"]["name"] if "backend" in config else "data_prep")
        placement = placement_of(config, self.request.profile)
        nproc = placement.nodes * placement.nproc_per_node
        problems += backend.check(config, nproc)
        if step.words == self.request.words:  # what a pipe is told goes to all of its stages
            problems += not_heard(config, composed)
        if config["code"]["require_clean"] and self.code.uncommitted:
            what = f"uncommitted changes: {', '.join(self.code.uncommitted[:SHOWN])}"
            problems.append(Problem(what, "code.require_clean=true", "commit them, or set code.require_clean=false"))
        outputs, found = _outputs(config, composed, backend.makes(config))
        problems += found
        print_ = fingerprint(config, inputs, self.code)
        sizes: Tree = {}
        if config["kind"] == "train":
            asked = Question(config, inputs, backend, placement.nodes, placement.nproc_per_node, placement.options)
            sizes, found = estimate(asked, print_, placement, self.runs)
            problems += found
            problems += smoke_problems(config, placement, self.request.smoke, self.runs)
        problems += conversion_problems(config, inputs, nproc)
        if problems:
            raise UserError(*problems)

        stands_for = {"fingerprint": fingerprint(whole, inputs, self.code), **length(whole)} if smoke else {}
        directory = RunDir(self.run_dir).stage(step.name).path
        resume_from = _resume_from(config, inputs, print_, self.runs)
        run = {
            "id": self.plan_id,
            "stage": step.name,
            "dir": str(directory),
            "store": str(self.resolver.store.root),
            "fingerprint": print_,
        }
        launch = backend.describe(StageSpec(config, inputs, outputs, run, nproc, resume_from))
        stage = StagePlan(
            name=step.name,
            words=step.words,
            config_name=step.config_name,
            kind=config["kind"],
            method=config["method"],
            config=config,
            changed={
                **_changed(config, composed, self._base(step)),
                **blend,
                **dict.fromkeys(smoke, Origin("command line", f"--smoke {self.request.smoke}")),
            },
            inputs=inputs,
            outputs=outputs,
            launch=replace(launch, env={**launch.env, "PYTHONPATH": python_path(self.run_dir)}),
            placement=placement,
            directory=str(directory),
            fingerprint=print_,
            reused=self._reused(print_, outputs) if reuse else None,
            resume_from=resume_from,
            stands_for=stands_for,
            estimate=sizes,
        )
        problems = get_executor(placement.executor).check(stage)
        if problems:
            raise UserError(*problems)
        return stage

    def _reused(self, print_: str, outputs: tuple[Output, ...]) -> Artifact | None:
        found = [self.resolver.made(print_, output.slot, output.name) for output in outputs]
        return found[0] if all(found) else None

    def _base(self, step: Step) -> Tree:
        if "default" not in self.catalog.configs(step.family, *step.words):
            return {}
        return base_tree(self.catalog, "/".join(("recipe", step.family, *step.words, "default")))


def _with_blend(config: Tree, composed: Composed, cwd: Path) -> tuple[Tree, dict[str, Origin]]:
    """The config with the sources that its blend file names, and who said so. UserError: what is wrong with it."""
    if config["kind"] != "data_prep" or config["data"]["blend"] is None:
        return config, {}
    from nemotron_recipes.data.blend import read_blend

    said = composed.origin("data.blend") or Origin("default", "schema")
    other = composed.origin("data.sources")
    if other is not None and other.kind == "command line":
        raise UserError(Problem("data.blend and data.sources exclude each other", str(other)))
    sources = read_blend(cwd / os.path.expanduser(config["data"]["blend"]), config["method"])
    return {**config, "data": {**config["data"], "sources": sources, "blend": None}}, {"data.sources": said}


def _outputs(config: Tree, composed: Composed, made: str) -> tuple[tuple[Output, ...], list[Problem]]:
    """The output of slot `made`; names that the store refuses and outputs that no such stage makes are problems."""
    outputs: list[Output] = []
    problems: list[Problem] = []
    for slot, name in config["outputs"].items():
        where = str(composed.origin(f"outputs.{slot}") or "")
        if slot == made and not name:
            problems.append(Problem(f"'outputs.{slot}' must name what the stage makes", where, f"outputs.{slot}=NAME"))
        elif slot == made:
            problems += [Problem(f"outputs.{slot}: {p.what}", where, p.fix) for p in name_problems(name)]
            outputs.append(Output(slot, name, slot))
        elif name is not None:
            problems.append(Problem(f"this stage makes no {slot}", where, f"name its {made}: outputs.{made}=NAME"))
    return tuple(outputs), problems


def _changed(config: Tree, composed: Composed, base: Tree) -> dict[str, Origin]:
    """Which layer set each leaf that differs from the recipe's base; "default" where a removal uncovered one."""
    before = {**defaults_of(config["kind"]), **flatten(base)}
    changed = {}
    for key, value in flatten(config).items():
        known = key in before or any(name.startswith(f"{key}.") for name in before)
        origin = composed.origin(key)
        if key.startswith("run.") and origin is None:
            continue  # the executor's own default
        if not known or before.get(key) != value:
            if not known and origin is None:
                continue  # a default inside a section that the base leaves out
            changed[key] = origin or Origin("default", "schema")
    return changed


def _resume_from(config: Tree, inputs: dict[str, Artifact], print_: str, runs: Path) -> str | None:
    if config["kind"] != "train":
        return None
    if "checkpoint.load" in inputs:
        return inputs["checkpoint.load"].uri
    if not config["train"]["resume"]:
        return None
    found = transport.call(there.resumable, str(runs), print_)
    if found is None:
        what = "train.resume=true, but no unfinished run with this fingerprint has a whole checkpoint"
        raise UserError(Problem(what, fix=f"leave it out to start anew; runs are looked for in {runs}"))
    return str(found)


def _drop(tree: Any, parts: list[str]) -> None:
    for part in parts[:-1]:
        tree = tree.get(part, {})
    tree.pop(parts[-1], None)


def _put(tree: Any, parts: list[str], value: str) -> None:
    for part in parts[:-1]:
        tree = tree[int(part)] if part.isdigit() else tree[part]
    tree[parts[-1]] = value
