"""Executor `slurm`: one batch job per stage, chained; the scheduler alone carries the run, no process of ours waits."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter

from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.executors import Liveness, checks
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.slurm import chain, control, deep, doctor, facts, files, outcome, script, snapshot
from nemotron_recipes.executors.slurm import handles as slurm_handle
from nemotron_recipes.executors.slurm.preflight import plan_problems
from nemotron_recipes.executors.slurm.profile import SlurmProfile, contradictions
from nemotron_recipes.rundir import RunDir, read_json
from nemotron_recipes.spec import Examination, JobHandle, Outlook, Plan, Rendered, StagePlan, Tree, Wait

_STOP_SECONDS = 180.0  # beyond any site's KillWait (30 s unless told)
_POLL_SECONDS = 0.2


class SlurmExecutor:
    """The `Executor` for a Slurm cluster whose commands and whose shared file system are at hand here."""

    name = "slurm"
    profile_model = SlurmProfile
    detaches = True
    at_once: int | None = None
    ask_seconds = 10.0  # every question costs slurmctld a lock

    def __init__(self, told: snapshot.Snapshot | None = None):
        self._told = told  # what Slurm has said of many runs together; None: it is asked of each

    def together(self, handles: Sequence[JobHandle]) -> SlurmExecutor:
        """One question to slurmctld, one to the accounting."""
        return SlurmExecutor(snapshot.take(handles))

    def check(self, stage: StagePlan) -> list[Problem]:
        """Secrets, reserved names, text that can't travel, and settings that contradict each other."""
        problems = [*checks.secret_problems(stage), *checks.env_problems(stage, script.RESERVED_ENV)]
        problems += checks.text_problems(stage, script.worker_argv(stage))
        for key, what, fix in contradictions(script.profile_of(stage)):
            problems.append(Problem(what, checks.where(stage, key), fix))
        if any(character in stage.directory for character in "%\\\n"):
            what = f"Slurm changes or cuts a path with a percent sign, a backslash or a line break: {stage.directory!r}"
            problems.append(Problem(what, checks.where(stage), "see [artifacts] output"))
        if script.profile_of(stage).image and any(character in stage.directory for character in ",:"):
            what = f"Pyxis cuts a mount at a comma or a colon: {stage.directory!r}"
            problems.append(Problem(what, checks.where(stage), "see [artifacts] output"))
        if stage.launch.launcher == "plain" and stage.placement.nodes > 1:
            what = f"{stage.name} is one process, but {stage.placement.nodes} nodes are asked for"
            problems.append(Problem(what, checks.where(stage, "nodes"), "set run.nodes=1"))
        return problems

    def render(self, plan: Plan) -> Rendered:
        """Per stage the sbatch script and what it reads; then the submitting commands. Needs no Slurm here."""
        run = [stage for stage in plan.stages if stage.reused is None]
        stages = tuple(script.rendered_stage(plan, stage, first=stage is run[0]) for stage in run)
        return Rendered(stages, script.submit_commands(plan, run))

    def preflight(self, plan: Plan, beside: Sequence[Plan] = ()) -> list[Problem]:
        """What this cluster would refuse, or leave waiting for ever. UserError: Slurm can't be asked."""
        return plan_problems(plan, beside)

    def examine(self, profile: Tree) -> Examination:
        """Version, partitions, accounts, containers, credentials: what `nemotron doctor` shows."""
        return doctor.examine(SlurmProfile.model_validate(profile))

    def look_into_nodes(self, profile: Tree, folder: str, patience: float) -> Examination:
        """A job on as many nodes as the profile has."""
        return deep.look_into_nodes(SlurmProfile.model_validate(profile), folder, patience)

    def submit(self, plan: Plan, rendered: Rendered) -> JobHandle:
        """Submit the jobs of all stages that have not succeeded yet; an error leaves no job behind."""
        return chain.submit(self.name, plan, rendered)

    def liveness(self, handle: JobHandle) -> Liveness:
        """While Slurm can't be asked, a run without a recorded end counts as running: nothing else is known of it."""
        return self.look(handle).alive

    def look(self, handle: JobHandle) -> Outlook:
        """One question per job; none once the end is recorded."""
        run = RunDir(Path(handle.run_dir))
        if outcome.has_ended(run):
            return Outlook("ended")
        told = [e["event"] for e in outcome.since_submission(run) if e["event"] in ("stage-started", "requeued")]
        begun = told[-1:] == ["stage-started"]  # what went back into the queue waits once more
        try:
            states = self._states(handle)
        except control.Unreachable as error:
            undecided = isinstance(error, slurm_handle.Undecided)
            return Outlook("running" if begun else "queued", unreachable=str(error), accepted=not undecided)
        jobs = tuple(facts.job_facts(stage, state) for stage, state in states.items())
        alive = [state for state in states.values() if state.active]
        if alive:
            return Outlook("queued" if not begun and all(state.waiting for state in alive) else "running", jobs)
        if outcome.has_ended(run):  # it came while Slurm was asked
            return Outlook("ended", jobs)
        return Outlook("ended" if self._missing(handle, states) else "lost", jobs)

    def waits(self, handle: JobHandle) -> list[Wait]:
        """Why the jobs that are in the queue are there. UserError when Slurm can't be asked."""
        try:
            states = self._states(handle)
        except control.Unreachable as error:
            raise control.missing(error) from None
        return [facts.wait_of(stage, state) for stage, state in states.items() if state.waiting]

    def differences(self, handle: JobHandle) -> list[str]:
        """Asks slurmctld and the accounting of every job that has not been forgotten."""
        run = RunDir(Path(handle.run_dir))
        over, ends = outcome.has_ended(run), outcome.ends(run)
        try:
            told = self._told or snapshot.take([handle])
            states = told.states(handle)
        except control.Unreachable as error:
            return [] if over else [f"Slurm can't be asked ({error}): this is what the run folder says"]
        ended = {stage: ends.get(stage, "ended" if over else "") for stage in states}
        found = [facts.difference(stage, state, ended[stage]) for stage, state in states.items()]
        return [sentence for sentence in found if sentence]

    def shell(self, handle: JobHandle, stage: str, command: Sequence[str]) -> list[str]:
        """A step of its own beside the stage's, on the first of its nodes, in its image where it has one."""
        try:
            state = self._states(handle).get(stage)
        except control.Unreachable as error:
            raise control.missing(error) from None
        if state is None or state.state != "RUNNING":
            what = f"{stage} of {handle.run} is not running" + (f": its job is {state.state}" if state else "")
            raise UserError(Problem(what, handle.run_dir))
        plan = TypeAdapter(Plan).validate_python(read_json(RunDir(Path(handle.run_dir)).plan))
        planned = next(each for each in plan.stages if each.name == stage)
        return transport.current().at_terminal(script.shell_command(plan, planned, state.job, command))

    def settle(self, handle: JobHandle) -> list[Tree]:
        """The events that end the run, where the job was stopped before it could write them."""
        try:
            states = self._states(handle)
        except control.Unreachable:
            return []
        if any(state.active for state in states.values()):
            return []
        missing = self._missing(handle, states)
        run = RunDir(Path(handle.run_dir))
        if not missing:  # Slurm has forgotten it
            with suppress(OSError, control.Unreachable):
                transport.call(there.forget_secrets, run.path, files.secrets(run))
        # Somebody else's run is only read.
        with suppress(OSError, control.Unreachable), open(run.path / "settle.lock", "ab") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)  # where locks lie, the events may stand there twice: no harm
            if missing and not outcome.has_ended(run):
                # before anybody hears of the end, and submits again
                transport.call(there.remove, files.secrets(run))
                for event in missing:
                    slurm_handle.tell(run, **event)
        return missing

    def tidy(self, handle: JobHandle) -> list[str]:
        """Cancel jobs that wait for one that has failed, where the site can't be told to do it (profile: `remove`)."""
        run = RunDir(Path(handle.run_dir))
        told = outcome.since_submission(run)
        if not handle.native.get("stay") or any(event["event"] == "tidied" for event in told):
            return []
        try:
            states = self._states(handle)
            stuck = {stage: state.job for stage, state in states.items() if state.never}
            control.scancel(stuck.values())
        except (control.Unreachable, control.Refused) as error:
            return [f"jobs of it may wait for ever for one that has failed, and can't be cancelled: {error}"]
        if stuck or not any(state.active for state in states.values()):
            with suppress(OSError, control.Unreachable):  # somebody else's run folder
                slurm_handle.tell(run, "tidied", jobs=[*stuck.values()])
        words = "waited for a job that has failed, and would have done so for ever: it was cancelled"
        return [f"{stage}: job {job} {words}" for stage, job in stuck.items()]

    def left_behind(self, handle: JobHandle) -> list[str]:
        """Nothing: Slurm ends a job's processes."""
        return []

    def cancel(self, handle: JobHandle) -> None:
        """scancel every job, wait until they are gone, then record it; of a run that has ended nothing changes."""
        run = RunDir(Path(handle.run_dir))
        try:
            jobs = snapshot.jobs_of(slurm_handle.recovered(handle))
        except control.Unreachable as error:
            raise control.missing(error) from None
        deadline = time.monotonic() + _STOP_SECONDS
        try:
            control.scancel(job for job, state in snapshot.known(jobs.values()).items() if state.active)
            while alive := [job for job, state in snapshot.known(jobs.values()).items() if state.active]:
                if time.monotonic() > deadline:
                    raise JobFailed(f"run {handle.run}: jobs {', '.join(alive)} did not end after scancel")
                time.sleep(_POLL_SECONDS)
        except (control.Unreachable, control.Refused) as error:
            problem = Problem(f"run {handle.run} can't be stopped: {error}", fix=f"scancel {' '.join(jobs.values())}")
            raise UserError(problem) from None
        if not outcome.has_ended(run):
            transport.call(there.remove, files.secrets(run))
            begun = [e for e in outcome.since_submission(run) if e["event"] == "stage-started"]
            stage, attempt = (begun[-1]["stage"], begun[-1]["attempt"]) if begun else (None, None)
            slurm_handle.tell(run, "cancelled", stage=stage, attempt=attempt)

    def _states(self, handle: JobHandle) -> dict[str, control.JobState]:
        """Stage -> state of its job, in order, for those that Slurm knows."""
        return self._told.states(handle) if self._told is not None else snapshot.one_by_one(handle)

    def _missing(self, handle: JobHandle, states: Mapping[str, control.JobState]) -> list[Tree]:
        run = RunDir(Path(handle.run_dir))
        plan = read_json(run.plan) or {"stages": []}
        prints = {stage["name"]: stage["fingerprint"] for stage in plan["stages"]}
        return outcome.missing_events(run, dict(states), prints)
