"""Executor `slurm`: one batch job per stage, chained; the scheduler alone carries the run, no process of ours waits."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.executors import (
    Liveness,
    checks,
    nemo_experiment,
    slurm_container,
    slurm_control,
    slurm_deep,
    slurm_doctor,
    slurm_facts,
    slurm_files,
    slurm_handle,
    slurm_outcome,
    slurm_script,
    slurm_snapshot,
    slurm_submission,
    there,
    transport,
)
from nemotron_recipes.executors.slurm_files import CODE, SNAPSHOT
from nemotron_recipes.executors.slurm_preflight import plan_problems
from nemotron_recipes.executors.slurm_profile import SlurmProfile, contradictions
from nemotron_recipes.executors.verdict import is_done
from nemotron_recipes.redact import reads_like_a_secret
from nemotron_recipes.rundir import RunDir, StageDir, append_event, read_json, write_sealed
from nemotron_recipes.spec import Examination, JobHandle, Outlook, Plan, Rendered, StagePlan, Tree, Wait, to_json

_STOP_SECONDS = 180.0  # beyond any site's KillWait (30 s unless told)
_POLL_SECONDS = 0.2


class SlurmExecutor:
    """The `Executor` for a Slurm cluster whose commands and whose shared file system are at hand here."""

    name = "slurm"
    profile_model = SlurmProfile
    detaches = True
    at_once: int | None = None
    ask_seconds = 10.0  # every question costs slurmctld a lock

    def __init__(self, told: slurm_snapshot.Snapshot | None = None):
        self._told = told  # what Slurm has said of many runs together; None: it is asked of each

    def together(self, handles: Sequence[JobHandle]) -> SlurmExecutor:
        """One question to slurmctld, one to the accounting."""
        return SlurmExecutor(slurm_snapshot.take(handles))

    def check(self, stage: StagePlan) -> list[Problem]:
        """Secrets, reserved names, text that can't travel, and settings that contradict each other."""
        problems = [*checks.secret_problems(stage), *checks.env_problems(stage, slurm_script.RESERVED_ENV)]
        problems += checks.text_problems(stage, slurm_script.worker_argv(stage))
        for key, what, fix in contradictions(slurm_script.profile_of(stage)):
            problems.append(Problem(what, checks.where(stage, key), fix))
        if any(character in stage.directory for character in "%\\\n"):
            what = f"Slurm changes or cuts a path with a percent sign, a backslash or a line break: {stage.directory!r}"
            problems.append(Problem(what, checks.where(stage), "see [artifacts] output"))
        if slurm_script.profile_of(stage).image and any(character in stage.directory for character in ",:"):
            what = f"Pyxis cuts a mount at a comma or a colon: {stage.directory!r}"
            problems.append(Problem(what, checks.where(stage), "see [artifacts] output"))
        if stage.launch.launcher == "plain" and stage.placement.nodes > 1:
            what = f"{stage.name} is one process, but {stage.placement.nodes} nodes are asked for"
            problems.append(Problem(what, checks.where(stage, "nodes"), "set run.nodes=1"))
        return problems

    def render(self, plan: Plan) -> Rendered:
        """Per stage the sbatch script and what it reads; then the submitting commands. Needs no Slurm here."""
        run = [stage for stage in plan.stages if stage.reused is None]
        stages = tuple(slurm_script.rendered_stage(plan, stage, first=stage is run[0]) for stage in run)
        return Rendered(stages, slurm_script.submit_commands(plan, run))

    def preflight(self, plan: Plan) -> list[Problem]:
        """What this cluster would refuse, or leave waiting for ever. UserError: Slurm can't be asked."""
        return plan_problems(plan)

    def examine(self, profile: Tree) -> Examination:
        """Version, partitions, accounts, containers, credentials: what `nemotron doctor` shows."""
        return slurm_doctor.examine(SlurmProfile.model_validate(profile))

    def look_into_nodes(self, profile: Tree, folder: str, patience: float) -> Examination:
        """A job on as many nodes as the profile has."""
        return slurm_deep.look_into_nodes(SlurmProfile.model_validate(profile), folder, patience)

    def submit(self, plan: Plan, rendered: Rendered) -> JobHandle:
        """Submit the jobs of all stages that have not succeeded yet.

        What is about to be done is on disk before Slurm hears of it. Whoever gets an error instead of a handle leaves
        no job behind. UserError: sbatch refused, with its own words; or it is not here.
        """
        where = transport.current()
        run = RunDir(where.near(plan.run_dir))
        with slurm_handle.alone(run, wait=True):
            _make_ready(plan, run)
            stages = self._unfinished(plan, run, rendered)
            attempts = {name: StageDir(run.stage(name).path).last_attempt() + 1 for name in stages}
            names = {name: job for stage in plan.stages if stage.name in stages for name, job in _names(plan, stage)}
            tokens = {name: slurm_submission.new_token(job) for name, job in names.items()}
            stay = any(slurm_script.waits_for_ever(command) for each in stages.values() for command in each.values())
            native = {"jobs": {}, "names": names, "tokens": tokens, "stay": stay, **where.native}
            native["earlier"] = _earlier(run)
            handle = JobHandle(self.name, plan.id, str(run.path), native)
            write_sealed(run.handle, asdict(handle))
            untold = self._send(plan, handle, stages, attempts)
        if not where.name:
            jobs = {name: handle.native["jobs"][name] for name in stages}
            scripts = {name: str(slurm_files.script(run.stage(name))) for name in stages}
            with suppress(OSError):  # the jobs are there; only NeMo-Run's own list would lack them
                nemo_experiment.note(run.path, plan.id, jobs, scripts)
        if untold:
            said = f"all jobs of {plan.id} are in the queue; only its folder does not say so yet ({untold})"
            note = f"{said}: nemotron runs show {plan.id} will write it there"
            return replace(handle, native={**handle.native, "note": note})
        return handle

    def _send(
        self,
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
            slurm_handle.keep(handle)
            before, hidden = self._before(plan), _secret_values(plan)
            if hidden:
                transport.call(there.write, slurm_files.secrets(run), to_json(hidden), 0o600)
            transport.call(there.write, slurm_files.submission(run), slurm_files.attempts_text(attempts), 0o644)
            slurm_handle.tell(run, "submitting", attempts=dict(attempts))
            for stage, name, command in [(s, n, c) for s, commands in stages.items() for n, c in commands.items()]:
                token = native["tokens"][name]
                transport.call(there.make_stage_folders, run.stage(stage).path, CODE, run.path / SNAPSHOT)
                argv = slurm_script.resolved(command, {**jobs, **before}, native["tokens"])
                begun.append(name)
                jobs[name] = slurm_submission.submit(
                    *(argv, plan.run_dir, [*hidden], slurm_handle.answer(run, handle, name)),
                    *(token, native["names"][name], earlier),
                )
                slurm_handle.keep_here(handle)
                _refuse_for_ever(plan, stage, jobs[name])
                if jobs.keys() < native["tokens"].keys():
                    slurm_handle.keep_there(handle)
            return slurm_handle.announce(run, handle, attempts)
        except BaseException as error:  # Ctrl-C, too
            self._withdraw(run, handle, begun, error)
            if isinstance(error, slurm_control.Unreachable):
                raise slurm_control.missing(error) from None
            if isinstance(error, slurm_control.Refused):
                stage = begun[-1].removesuffix(slurm_script.ARRAY_SUFFIX)
                raise UserError(_refusal(plan, stage, str(error))) from None
            if isinstance(error, OSError):
                what = f"{error.filename or plan.run_dir} can't be written: {error.strerror}"
                raise UserError(Problem(what, fix="nothing was submitted")) from None
            raise

    def liveness(self, handle: JobHandle) -> Liveness:
        """While Slurm can't be asked, a run without a recorded end counts as running: nothing else is known of it."""
        return self.look(handle).alive

    def look(self, handle: JobHandle) -> Outlook:
        """One question per job; none once the end is recorded."""
        run = RunDir(Path(handle.run_dir))
        if slurm_outcome.has_ended(run):
            return Outlook("ended")
        told = [e["event"] for e in slurm_outcome.since_submission(run) if e["event"] in ("stage-started", "requeued")]
        begun = told[-1:] == ["stage-started"]  # what went back into the queue waits once more
        try:
            states = self._states(handle)
        except slurm_control.Unreachable as error:
            undecided = isinstance(error, slurm_handle.Undecided)
            return Outlook("running" if begun else "queued", unreachable=str(error), accepted=not undecided)
        jobs = tuple(slurm_facts.job_facts(stage, state) for stage, state in states.items())
        alive = [state for state in states.values() if state.active]
        if alive:
            return Outlook("queued" if not begun and all(state.waiting for state in alive) else "running", jobs)
        if slurm_outcome.has_ended(run):  # it came while Slurm was asked
            return Outlook("ended", jobs)
        return Outlook("ended" if self._missing(handle, states) else "lost", jobs)

    def waits(self, handle: JobHandle) -> list[Wait]:
        """Why the jobs that are in the queue are there. UserError when Slurm can't be asked."""
        try:
            states = self._states(handle)
        except slurm_control.Unreachable as error:
            raise slurm_control.missing(error) from None
        return [slurm_facts.wait_of(stage, state) for stage, state in states.items() if state.waiting]

    def differences(self, handle: JobHandle) -> list[str]:
        """Asks slurmctld and the accounting of every job that has not been forgotten."""
        ended = slurm_outcome.has_ended(RunDir(Path(handle.run_dir)))
        try:
            told = self._told or slurm_snapshot.take([handle])
            states = told.states(handle)
        except slurm_control.Unreachable as error:
            return [] if ended else [f"Slurm can't be asked ({error}): this is what the run folder says"]
        found = [slurm_facts.difference(stage, state, ended) for stage, state in states.items()]
        return [sentence for sentence in found if sentence]

    def shell(self, handle: JobHandle, stage: str, command: Sequence[str]) -> list[str]:
        """A step of its own beside the stage's, on the first of its nodes, in its image where it has one."""
        try:
            state = self._states(handle).get(stage)
        except slurm_control.Unreachable as error:
            raise slurm_control.missing(error) from None
        if state is None or state.state != "RUNNING":
            what = f"{stage} of {handle.run} is not running" + (f": its job is {state.state}" if state else "")
            raise UserError(Problem(what, handle.run_dir))
        plan = TypeAdapter(Plan).validate_python(read_json(RunDir(Path(handle.run_dir)).plan))
        planned = next(each for each in plan.stages if each.name == stage)
        return transport.current().at_terminal(slurm_script.shell_command(plan, planned, state.job, command))

    def settle(self, handle: JobHandle) -> list[Tree]:
        """The events that end the run, where the job was stopped before it could write them."""
        try:
            states = self._states(handle)
        except slurm_control.Unreachable:
            return []
        if any(state.active for state in states.values()):
            return []
        missing = self._missing(handle, states)
        run = RunDir(Path(handle.run_dir))
        if not missing:  # Slurm has forgotten it
            with suppress(OSError, slurm_control.Unreachable):
                transport.call(there.forget_secrets, run.path, slurm_files.secrets(run))
        # Somebody else's run is only read.
        with suppress(OSError, slurm_control.Unreachable), open(run.path / "settle.lock", "ab") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)  # where locks lie, the events may stand there twice: no harm
            if missing and not slurm_outcome.has_ended(run):
                # before anybody hears of the end, and submits again
                transport.call(there.remove, slurm_files.secrets(run))
                for event in missing:
                    slurm_handle.tell(run, **event)
        return missing

    def tidy(self, handle: JobHandle) -> list[str]:
        """Cancel jobs that wait for one that has failed, where the site can't be told to do it (profile: `remove`)."""
        run = RunDir(Path(handle.run_dir))
        told = slurm_outcome.since_submission(run)
        if not handle.native.get("stay") or any(event["event"] == "tidied" for event in told):
            return []
        try:
            states = self._states(handle)
            stuck = {stage: state.job for stage, state in states.items() if state.never}
            slurm_control.scancel(stuck.values())
        except (slurm_control.Unreachable, slurm_control.Refused) as error:
            return [f"jobs of it may wait for ever for one that has failed, and can't be cancelled: {error}"]
        if stuck or not any(state.active for state in states.values()):
            with suppress(OSError, slurm_control.Unreachable):  # somebody else's run folder
                slurm_handle.tell(run, "tidied", jobs=[*stuck.values()])
        words = "waited for a job that has failed, and would have done so for ever: it was cancelled"
        return [f"{stage}: job {job} {words}" for stage, job in stuck.items()]

    def cancel(self, handle: JobHandle) -> None:
        """scancel every job, wait until they are gone, then record it; of a run that has ended nothing changes."""
        run = RunDir(Path(handle.run_dir))
        try:
            jobs = slurm_snapshot.jobs_of(slurm_handle.recovered(handle))
        except slurm_control.Unreachable as error:
            raise slurm_control.missing(error) from None
        deadline = time.monotonic() + _STOP_SECONDS
        try:
            slurm_control.scancel(job for job, state in self._known(jobs.values()).items() if state.active)
            while alive := [job for job, state in self._known(jobs.values()).items() if state.active]:
                if time.monotonic() > deadline:
                    raise JobFailed(f"run {handle.run}: jobs {', '.join(alive)} did not end after scancel")
                time.sleep(_POLL_SECONDS)
        except (slurm_control.Unreachable, slurm_control.Refused) as error:
            problem = Problem(f"run {handle.run} can't be stopped: {error}", fix=f"scancel {' '.join(jobs.values())}")
            raise UserError(problem) from None
        if not slurm_outcome.has_ended(run):
            transport.call(there.remove, slurm_files.secrets(run))
            begun = [e for e in slurm_outcome.since_submission(run) if e["event"] == "stage-started"]
            stage, attempt = (begun[-1]["stage"], begun[-1]["attempt"]) if begun else (None, None)
            slurm_handle.tell(run, "cancelled", stage=stage, attempt=attempt)

    def _before(self, plan: Plan) -> dict[str, str]:
        """The last job of the run that must be over first, by its symbol's name; {} when it is over, or never was."""
        found = read_json(RunDir(Path(plan.after)).handle) if plan.after else None
        if plan.after is None or found is None or slurm_outcome.has_ended(RunDir(Path(plan.after))):
            return {}
        states = self._states(JobHandle(**found))
        alive = [state.job for state in states.values() if state.active]
        return {slurm_script.last_of(plan.after): alive[-1]} if alive else {}

    def _unfinished(self, plan: Plan, run: RunDir, rendered: Rendered) -> dict[str, dict[str, tuple[str, ...]]]:
        """Stage -> its commands by what they submit, for those that have not succeeded in an earlier submission."""
        prints = {stage.name: stage.fingerprint for stage in plan.stages}
        left = {}
        for stage in rendered.stages:
            commands = {
                slurm_script.array_of(stage.name)
                if Path(command[-1]).name == slurm_files.ARRAY
                else stage.name: command
                for command in rendered.submit
                if command[-1] in stage.files
            }
            if is_done(read_json(run.stage(stage.name).record), prints[stage.name]):
                slurm_handle.tell(run, "stage-skipped", stage=stage.name, reason="already succeeded")
            else:
                left[stage.name] = commands
        return left

    def _withdraw(self, run: RunDir, handle: JobHandle, begun: Sequence[str], why: BaseException) -> None:
        """No job of a submission that failed stays, not even one whose acceptance sbatch could not tell any more.

        Unknown: it can't be told what stays; whoever looks at the run later finds out, and takes it back.
        """
        jobs, lost = handle.native["jobs"], None
        for name in begun:
            try:
                job = jobs.get(name) or slurm_handle.find(handle, name, slurm_submission.PATIENCE)
            except (slurm_control.Unreachable, slurm_submission.Unknown) as error:
                lost = f"whether Slurm has accepted {name} of {handle.run} is not known: {error}"
                continue
            if job:
                jobs[name] = job
        try:
            if lost is None:
                slurm_handle.withdraw(run, handle)
        except (slurm_control.Refused, slurm_control.Unreachable, OSError) as error:
            if jobs:
                lost = f"jobs {' '.join(jobs.values())} are submitted and can't be taken back now: {error}"
            else:  # nothing was submitted, and the folder there does not matter any more
                append_event(run.events, "cancelled", stage=None, attempt=None)
        if lost is not None:
            fix = f"nemotron runs show {handle.run} asks again; until it knows, nothing is submitted a second time"
            raise slurm_submission.Unknown(str(Problem(lost, str(why), fix))) from None

    def _states(self, handle: JobHandle) -> dict[str, slurm_control.JobState]:
        """Stage -> state of its job, in order, for those that Slurm knows."""
        if self._told is not None:
            return self._told.states(handle)
        jobs = slurm_snapshot.jobs_of(slurm_handle.recovered(handle))
        known = self._known(jobs.values())
        return {stage: known[job] for stage, job in jobs.items() if job in known}

    def _known(self, jobs: Any) -> dict[str, slurm_control.JobState]:
        found = {job: slurm_control.job_state(job) for job in jobs}
        return {job: state for job, state in found.items() if state is not None}

    def _missing(self, handle: JobHandle, states: Mapping[str, slurm_control.JobState]) -> list[Tree]:
        run = RunDir(Path(handle.run_dir))
        plan = read_json(run.plan) or {"stages": []}
        prints = {stage["name"]: stage["fingerprint"] for stage in plan["stages"]}
        return slurm_outcome.missing_events(run, dict(states), prints)


def _make_ready(plan: Plan, run: RunDir) -> None:
    """The folders that containers mount and stages write to. UserError names those that can't be made."""
    problems = []
    for stage in (stage for stage in plan.stages if stage.reused is None):
        profile = slurm_script.profile_of(stage)
        if profile.image is None:
            continue
        for folder in slurm_container.folders(plan, profile):
            try:
                transport.call(there.make_folder, folder)
            except OSError as error:
                what = f"{folder}, which the container mounts, can't be made: {error.strerror}"
                problems.append(
                    Problem(what, checks.where(stage), "make it, or set another: hf_cache, [artifacts] store")
                )
    if problems:
        slurm_handle.tell(run, "cancelled", stage=None, attempt=None)
        raise UserError(*problems)


def _earlier(run: RunDir) -> list[str]:
    """Jobs of earlier submissions of the run: of the last one its handle may know more than the events."""
    told = read_json(run.handle)
    before = JobHandle(**told) if told else None
    return sorted({*slurm_handle.earlier_jobs(run, before), *(before.native["jobs"].values() if before else ())})


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
    name = slurm_script.job_name(plan, stage)
    array = [(slurm_script.array_of(stage.name), slurm_script.array_of(name))] if slurm_script.tasks_of(stage) else []
    return [*array, (stage.name, name)]


def _refuse_for_ever(plan: Plan, name: str, job: str) -> None:
    """UserError for a job that sbatch took although the partition can't ever start it (EnforcePartLimits=NO)."""
    try:
        state = slurm_control.job_state(job)
    except slurm_control.Unreachable:
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
