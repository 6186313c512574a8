"""What is refused before anything is written; then the run folder, and the hand-over to the executor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors import get_executor
from nemotron_recipes.executors.remote import sites, there, transport
from nemotron_recipes.fsio import files_below, write_atomic
from nemotron_recipes.lifecycle.preparing import Prepared
from nemotron_recipes.lifecycle.reach import speaking_to
from nemotron_recipes.lifecycle.runs import liveness, load
from nemotron_recipes.mirror.journal import open_journal
from nemotron_recipes.redact import scrub, secret_values
from nemotron_recipes.rundir import RunDir, append_event, write_sealed
from nemotron_recipes.spec import JobHandle, Plan


def check(prepared: Prepared, preflight: bool = True, beside: Sequence[Plan] = ()) -> list[Problem]:
    """What `submit` refuses before it writes anything. UserError: all of it. Returns what it does not refuse, and
    whoever submits should know.

    beside   what is going to be submitted with it
    """
    _refuse_unpinned(prepared.plan)
    with speaking_to(_site(prepared)) as where:
        refuse_rerun(RunDir(where.near(prepared.plan.run_dir)))
        return refuse_unfit(prepared, beside) if preflight else []


def submit(
    prepared: Prepared, preflight: bool = True, tell: Callable[[list[Problem]], None] | None = None
) -> JobHandle:
    """Write the run folder and hand it to the executor. UserError: an input is unpinned, or the plan has run already;
    or, unless `preflight` is False, all that the executor and the folders can't do, before anything is written. `tell`
    hears, before that as well, what `check` returns.

    A plan whose run failed, was cancelled or got lost may be submitted again: that is its next attempt.
    """
    remarks = check(prepared, preflight)
    if remarks and tell is not None:
        tell(remarks)
    with speaking_to(_site(prepared)) as where:
        return _submit(prepared, RunDir(where.near(prepared.plan.run_dir)))


def _site(prepared: Prepared) -> transport.Transport:
    """The machine of a plan, with its run's folder."""
    return sites.of_profile(prepared.plan.stages[0].placement.options, prepared.home, prepared.plan.run_dir)


def _submit(prepared: Prepared, run: RunDir) -> JobHandle:
    plan, where = prepared.plan, transport.current()
    try:
        _write_run(run, prepared)
    except (KeyboardInterrupt, UserError):  # Ctrl-C, or the code is not what was planned any more
        if run.plan.exists():
            append_event(run.events, "cancelled", stage=None, attempt=None)
        raise
    except OSError as error:
        problem = Problem(f"the run folder {run.path} can't be written: {error.strerror}", fix="see [artifacts] output")
        raise UserError(problem) from None
    if not where.name:
        open_journal(plan, run.path.parents[1])
    try:
        if where.name:
            _send(run)
        fields = {"executor": prepared.executor, "mode": plan.request.mode}
        transport.call(there.event, run.events, "submitted", fields)
    except (transport.Unreachable, OSError) as error:
        with suppress(OSError):
            append_event(run.events, "cancelled", stage=None, attempt=None)
        if isinstance(error, transport.Unreachable):
            raise
        what = f"the run folder can't be written: {error.strerror}"
        fix = "see remote_job_dir" if where.name else "see [artifacts] output"
        raise UserError(Problem(what, error.filename or plan.run_dir, fix)) from None
    return get_executor(prepared.executor).submit(plan, prepared.rendered)


def _send(run: RunDir) -> None:
    """The run's folder to where the run will be: all that was written here before anything was submitted."""
    pieces: list[list[Any]] = [[]]
    size = 0
    for path in files_below(run.path):
        name = path.relative_to(run.path).as_posix()
        if name in (run.events.name, run.handle.name) or name.startswith(".") or name.endswith(".lock"):
            continue
        data = path.read_bytes()
        if size + len(data) > there.PIECE and pieces[-1]:
            pieces.append([])
            size = 0
        pieces[-1].append([name, data, 0o644])
        size += len(data)
    for piece in pieces:
        transport.call(there.receive, run.path, piece)


def _write_run(run: RunDir, prepared: Prepared) -> None:
    from nemotron_recipes.planning.code import snapshot

    plan = prepared.plan
    run.path.mkdir(parents=True, exist_ok=True)
    write_sealed(run.plan, asdict(plan))
    write_sealed(run.rendered, asdict(prepared.rendered))
    snapshot(run.path, plan.code, prepared.code)
    patch = _patch(prepared)
    if patch:
        write_atomic(run.path / "code.patch", patch.encode("utf-8", "surrogateescape"))
    for stage in prepared.rendered.stages:
        near = transport.current().near
        near(stage.cwd).mkdir(parents=True, exist_ok=True)
        for path, text in stage.files.items():
            write_atomic(near(path), text)


def _patch(prepared: Prepared) -> str | None:
    """What git had not committed of the code that runs; without the values of secrets."""
    from nemotron_recipes.planning.code import git_diff

    plan = prepared.plan
    if plan.code.git_diff_digest is None:
        return None
    if prepared.code is not None:  # a rerun: the patch lies beside the code that is run once more
        path = prepared.code.parent.parent / "code.patch"
        return path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else None
    named = [name for stage in plan.stages for name in stage.placement.secrets]
    return scrub(git_diff() or "", secret_values(os.environ, named))


def _refuse_unpinned(plan: Plan) -> None:
    unpinned = [
        Problem(
            f"{stage.name}: {key} is {artifact.label}",
            fix="pin it (hf://ORG/NAME@COMMIT), or plan without --offline",
        )
        for stage in plan.stages
        for key, artifact in stage.inputs.items()
        if artifact.source in ("hub", "wandb") and artifact.revision is None
    ]
    if unpinned:
        raise UserError(*unpinned)


def refuse_unfit(prepared: Prepared, beside: Sequence[Plan] = ()) -> list[Problem]:
    """All at once: folders that are closed or too full, and what the executor knows that would not work. Returns what
    is no reason to refuse it."""
    from nemotron_recipes.planning.disk import disk_problems

    plan = prepared.plan
    places = {"[artifacts] output": plan.run_dir, "[artifacts] store": plan.store}
    if transport.current().name:
        places = {"remote_job_dir": plan.run_dir}
    told = {where: transport.call(there.refusal, folder) for where, folder in places.items()}
    problems = [Problem(said, where) for where, said in told.items() if said]
    problems += () if problems else disk_problems(plan)
    problems += _unreadable(plan)
    found = get_executor(prepared.executor).preflight(plan, beside)
    problems += [problem for problem in found if problem.refuses]
    if problems:
        raise UserError(*problems)
    return [problem for problem in found if not problem.refuses]


def _unreadable(plan: Plan) -> Iterator[Problem]:
    """Inputs that lie somewhere by now, and can't be read there."""
    stages = [stage for stage in plan.stages if stage.reused is None]
    inputs = {
        artifact.uri: f"stage {stage.name}, {key}"
        for stage in stages
        for key, artifact in stage.inputs.items()
        if artifact.source in ("path", "store")
    }
    for path, why in transport.call(there.unreadable, [*inputs]) if inputs else ():
        yield Problem(f"{path} can't be read: {why}", inputs.get(path, ""), "restore it, or make the plan again")


def refuse_rerun(run: RunDir) -> None:
    if not run.plan.exists():
        return
    view = load(run.path)
    if not view.plan:
        what = f"whether this plan is running is unknown: {view.explanation}"
        raise UserError(Problem(what, view.path, "mend it, or plan anew"))
    queued = view.state == "pending" and view.handle is not None and liveness(view.handle) == "queued"
    if queued or view.state in ("running", "stalled", "succeeded"):
        what = "is in the queue" if queued else "has run" if view.state == "succeeded" else "is running"
        fix = f"see nemotron runs show {view.id}; a new plan makes a new run"
        raise UserError(Problem(f"this plan {what} already", view.path, fix))
