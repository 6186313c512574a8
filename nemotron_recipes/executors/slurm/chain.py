"""The jobs of a plan, one after the other to sbatch, each waiting for the one before: all of them, or none stays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors import checks
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.slurm import (
    container,
    control,
    files,
    handles,
    nemo_experiment,
    outcome,
    script,
    snapshot,
    submission,
)
from nemotron_recipes.executors.slurm.files import CODE, SNAPSHOT
from nemotron_recipes.executors.verdict import is_done
from nemotron_recipes.redact import reads_like_a_secret
from nemotron_recipes.rundir import RunDir, StageDir, append_event, read_json, write_sealed
from nemotron_recipes.spec import JobHandle, Plan, Rendered, StagePlan, to_json


def submit(executor: str, plan: Plan, rendered: Rendered) -> JobHandle:
    """What `SlurmExecutor.submit` does: the jobs of all stages that have not succeeded yet.

    What is about to be done is on disk before Slurm hears of it. Whoever gets an error instead of a handle leaves
    no job behind. UserError: sbatch refused, with its own words; or it is not here.
    """
    where = transport.current()
    run = RunDir(where.near(plan.run_dir))
    with handles.alone(run, wait=True):
        _make_ready(plan, run)
        stages = _unfinished(plan, run, rendered)
        attempts = {name: StageDir(run.stage(name).path).last_attempt() + 1 for name in stages}
        names = {name: job for stage in plan.stages if stage.name in stages for name, job in _names(plan, stage)}
        tokens = {name: submission.new_token(job) for name, job in names.items()}
        stay = any(script.waits_for_ever(command) for each in stages.values() for command in each.values())
        native = {"jobs": {}, "names": names, "tokens": tokens, "stay": stay, **where.native}
        native["earlier"] = _earlier(run)
        handle = JobHandle(executor, plan.id, str(run.path), native)
        write_sealed(run.handle, asdict(handle))
        untold = _send(plan, handle, stages, attempts)
    if not where.name:
        jobs = {name: handle.native["jobs"][name] for name in stages}
        scripts = {name: str(files.script(run.stage(name))) for name in stages}
        with suppress(OSError):  # the jobs are there; only NeMo-Run's own list would lack them
            nemo_experiment.note(run.path, plan.id, jobs, scripts)
    if untold:
        said = f"all jobs of {plan.id} are in the queue; only its folder does not say so yet ({untold})"
        note = f"{said}: nemotron runs show {plan.id} will write it there"
        return replace(handle, native={**handle.native, "note": note})
    return handle


def _send(
    plan: Plan,
    handle: JobHandle,
    stages: Mapping[str, Mapping[str, tuple[str, ...]]],
    attempts: Mapping[str, int],
) -> str:
    """One sbatch after the other; all of them, or none stays. "", or why the run's folder does not say so."""
    run, native = RunDir(Path(handle.run_dir)), handle.native
    jobs, earlier = native["jobs"], native["earlier"]
    begun: list[str] = []
    try:
        handles.keep(handle)
        before, hidden = _before(plan, run), _secret_values(plan)
        if hidden:
            transport.call(there.write, files.secrets(run), to_json(hidden), 0o600)
        transport.call(there.write, files.submission(run), files.attempts_text(attempts), 0o644)
        handles.tell(run, "submitting", attempts=dict(attempts))
        for stage, name, command in [(s, n, c) for s, commands in stages.items() for n, c in commands.items()]:
            token = native["tokens"][name]
            transport.call(there.make_stage_folders, run.stage(stage).path, CODE, run.path / SNAPSHOT)
            argv = script.resolved(command, {**jobs, **before}, native["tokens"])
            begun.append(name)
            jobs[name] = submission.submit(
                *(argv, plan.run_dir, [*hidden], handles.answer(run, handle, name)),
                *(token, native["names"][name], earlier),
            )
            handles.keep_here(handle)
            _refuse_for_ever(plan, stage, jobs[name])
            if jobs.keys() < native["tokens"].keys():
                handles.keep_there(handle)
        return handles.announce(run, handle, attempts)
    except BaseException as error:  # Ctrl-C, too
        _withdraw(run, handle, begun, error)
        if isinstance(error, control.Unreachable):
            raise control.missing(error) from None
        if isinstance(error, control.Refused):
            stage = begun[-1].removesuffix(script.ARRAY_SUFFIX)
            raise UserError(_refusal(plan, stage, str(error))) from None
        if isinstance(error, OSError):
            what = f"{error.filename or plan.run_dir} can't be written: {error.strerror}"
            raise UserError(Problem(what, fix="nothing was submitted")) from None
        raise


def _before(plan: Plan, run: RunDir) -> dict[str, str]:
    """The last job of the run that must be over first, by its symbol's name; {} when it is over, or never was."""
    if plan.after is None:
        return {}
    other = RunDir(run.path.with_name(Path(plan.after).name))  # beside this one, on whichever machine
    found = read_json(other.handle)
    if found is None or outcome.has_ended(other):
        return {}
    states = snapshot.one_by_one(JobHandle(**found))
    alive = [state.job for state in states.values() if state.active]
    return {script.last_of(plan.after): alive[-1]} if alive else {}


def _unfinished(plan: Plan, run: RunDir, rendered: Rendered) -> dict[str, dict[str, tuple[str, ...]]]:
    """Stage -> its commands by what they submit, for those that have not succeeded in an earlier submission."""
    prints = {stage.name: stage.fingerprint for stage in plan.stages}
    left = {}
    for stage in rendered.stages:
        commands = {
            script.array_of(stage.name) if Path(command[-1]).name == files.ARRAY else stage.name: command
            for command in rendered.submit
            if command[-1] in stage.files
        }
        if is_done(read_json(run.stage(stage.name).record), prints[stage.name]):
            handles.tell(run, "stage-skipped", stage=stage.name, reason="already succeeded")
        else:
            left[stage.name] = commands
    return left


def _withdraw(run: RunDir, handle: JobHandle, begun: Sequence[str], why: BaseException) -> None:
    """No job of a submission that failed stays, not even one whose acceptance sbatch could not tell any more.

    Unknown: it can't be told what stays; whoever looks at the run later finds out, and takes it back.
    """
    jobs, lost = handle.native["jobs"], None
    for name in begun:
        try:
            job = jobs.get(name) or handles.find(handle, name, submission.PATIENCE)
        except (control.Unreachable, submission.Unknown) as error:
            lost = f"whether Slurm has accepted {name} of {handle.run} is not known: {error}"
            continue
        if job:
            jobs[name] = job
    try:
        if lost is None:
            handles.withdraw(run, handle)
    except (control.Refused, control.Unreachable, OSError) as error:
        if jobs:
            lost = f"jobs {' '.join(jobs.values())} are submitted and can't be taken back now: {error}"
        else:  # nothing was submitted, and the folder there does not matter any more
            append_event(run.events, "cancelled", stage=None, attempt=None)
    if lost is not None:
        fix = f"nemotron runs show {handle.run} asks again; until it knows, nothing is submitted a second time"
        raise submission.Unknown(str(Problem(lost, str(why), fix))) from None


def _make_ready(plan: Plan, run: RunDir) -> None:
    """The folders that containers mount and stages write to. UserError names those that can't be made."""
    problems = []
    for stage in (stage for stage in plan.stages if stage.reused is None):
        profile = script.profile_of(stage)
        if profile.image is None:
            continue
        for folder in container.folders(plan, profile):
            try:
                transport.call(there.make_folder, folder)
            except OSError as error:
                what = f"{folder}, which the container mounts, can't be made: {error.strerror}"
                problems.append(
                    Problem(what, checks.where(stage), "make it, or set another: hf_cache, [artifacts] store")
                )
    if problems:
        handles.tell(run, "cancelled", stage=None, attempt=None)
        raise UserError(*problems)


def _earlier(run: RunDir) -> list[str]:
    """Jobs of earlier submissions of the run: of the last one its handle may know more than the events."""
    told = read_json(run.handle)
    before = JobHandle(**told) if told else None
    return sorted({*handles.earlier_jobs(run, before), *(before.native["jobs"].values() if before else ())})


def _secret_values(plan: Plan) -> dict[str, str]:
    """Declared secrets, and variables that are taken for secrets by their names: neither goes through sbatch.

    slurmctld keeps a job's environment in its files, and sacct may store it.
    """
    declared = {name for stage in plan.stages for name in stage.placement.secrets}
    if transport.current().name:  # this machine's own keys are nobody's business there
        return {name: os.environ[name] for name in declared if name in os.environ}
    return {name: value for name, value in os.environ.items() if name in declared or reads_like_a_secret(name)}


def _names(plan: Plan, stage: StagePlan) -> list[tuple[str, str]]:
    """(what is submitted, its job's name) of a stage, in order."""
    name = script.job_name(plan, stage)
    array = [(script.array_of(stage.name), script.array_of(name))] if script.tasks_of(stage) else []
    return [*array, (stage.name, name)]


def _refuse_for_ever(plan: Plan, name: str, job: str) -> None:
    """UserError for a job that sbatch took although the partition can't ever start it (EnforcePartLimits=NO)."""
    try:
        state = control.job_state(job)
    except control.Unreachable:
        return  # it was accepted; whatever becomes of it is seen later
    if state is not None and state.impossible:
        words = f"Requested time or node configuration is more than the partition allows ({state.reason})"
        raise UserError(_refusal(plan, name, words))


def _refusal(plan: Plan, name: str, words: str) -> Problem:
    stage = next(stage for stage in plan.stages if stage.name == name)
    said = "\n".join(line.removeprefix("sbatch: error: ") for line in words.splitlines())
    lower = said.lower()
    fix = "change the profile in env.toml, or run.FIELD=... on the command line"
    for word, field in (("partition", "partition"), ("account", "account"), ("qos", "qos"), ("time", "time")):
        if word in lower:
            fix = f"set {field} in the profile, or run.{field}=... on the command line"
            break
    if "unrecognized option" in lower:
        fix = 'name the flag under remove = ["FLAG"] in the profile: this Slurm does not know it'
    elif "node configuration" in lower:
        fix = "ask for what the partition's nodes have: nodes, gpus_per_node, cpus_per_task, mem"
    return Problem(f"Slurm refuses stage {name}: {said}", checks.where(stage), fix)
