"""The plan of an earlier run once more, as a new run: the same config, pinned inputs, code and placement."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from nemotron_recipes.artifacts.records import command_line
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.remote import transport
from nemotron_recipes.planning import there
from nemotron_recipes.planning.code import describe_code, digest_of, python_path, snapshot_of
from nemotron_recipes.spec import Artifact, Plan, StagePlan, Tree


def renewed(saved: Plan, saved_tree: Tree) -> Tree:
    """`saved_tree` (the plan as plain data) under a new run id.

    The id stands in folders, worker files and pending inputs. It ends in random digits, so nothing else reads like it.
    """
    new = f"{saved.id.rpartition('-')[0]}-{secrets.token_hex(4)}"
    tree: Tree = json.loads(json.dumps(saved_tree).replace(saved.id, new))
    tree["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    tree["rerun_of"] = saved.id
    tree["sweep"] = tree["after"] = None
    return tree


def with_own_path(plan: Plan) -> Plan:
    """The caller's PYTHONPATH may be another one than it was: stages get today's behind the run's own code."""
    path = python_path(Path(plan.run_dir))
    stages = tuple(
        replace(stage, launch=replace(stage.launch, env={**stage.launch.env, "PYTHONPATH": path}))
        for stage in plan.stages
    )
    return replace(plan, stages=stages)


def check_same(saved: Plan, run_dir: Path) -> None:
    """UserError with everything that makes the same plan impossible: inputs that moved, code that is gone."""
    problems = [problem for stage in saved.stages for problem in _input_problems(saved, stage)]
    copy = snapshot_of(run_dir)
    if not copy.is_dir() or digest_of(copy) != saved.code.digest:
        what = "the run's copy of the code is missing or has changed"
        fix = f"run it with today's code: {command_of(saved)}"
        problems.append(Problem(what, str(copy), fix))
    if problems:
        raise UserError(*problems)


def differences_now(saved: Plan) -> list[str]:
    """What is different today though the plan is the same, in words; the rerun is not changed by it."""
    found = []
    now = describe_code()
    if now.digest != saved.code.digest:
        commits = [(code.git_commit or "no commit")[:12] for code in (saved.code, now)]
        where = f" ({commits[0]} -> {commits[1]})" if commits[0] != commits[1] else ""
        found.append(f"the code here has changed since{where}; the rerun takes the run's own copy of its code")
    for stage in saved.stages:
        for key, artifact in stage.inputs.items():
            if artifact.source != "store":
                continue
            newest = transport.call(there.versions, saved.store, artifact.name)[-1:]
            if newest and newest[0] != artifact.version:
                found.append(f"{stage.name}: {key} stays {artifact.label}; the newest is v{newest[0]}")
    return found


def profile_differences(saved: Plan, today: Tree) -> list[str]:
    """Keys of the profile that env.toml has other values for now; the rerun keeps the old ones. today: what it says."""
    typed = {override.lstrip("+~").partition("=")[0] for override in saved.request.overrides}
    found = []
    for key, value in sorted(today.items()):
        options = [stage.placement.options for stage in saved.stages if key in stage.placement.options]
        was = next((option[key] for option in options if option[key] != value), value)
        if was != value and f"run.{key}" not in typed:
            name = f"{key} of profile {saved.request.profile}"
            found.append(f"{name} is {value!r} in env.toml now; the rerun keeps {was!r}")
    return found


def command_of(plan: Plan) -> str:
    """The command that a plan was made from."""
    request = plan.request
    return command_line(plan.title, request.mode, request.profile, request.overrides)


def _input_problems(plan: Plan, stage: StagePlan) -> Iterator[Problem]:
    for key, artifact in stage.inputs.items():
        where = f"{stage.name}: {key}"
        if artifact.source == "store":
            try:
                found = Artifact.from_tree(
                    transport.call(there.stored, plan.store, f"{artifact.name}:v{artifact.version}")
                )
            except UserError as error:
                yield from (Problem(f"{where}: {p.what}", p.where, p.fix) for p in error.problems)
                continue
            if found.digest != artifact.digest:
                yield Problem(f"{where}: {artifact.label} is another one than it was", found.uri, "restore it")
        elif artifact.source == "path" and artifact.digest:
            try:
                now = transport.call(there.digest, artifact.uri)
            except FileNotFoundError:
                yield Problem(f"{where}: {artifact.uri} is gone", fix="restore it")
                continue
            if now != artifact.digest:
                yield Problem(f"{where}: {artifact.uri} has changed since that run", fix="restore it")
