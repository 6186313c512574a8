"""What Slurm says of the jobs of many runs, asked together: a list of a thousand runs costs it what one run does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nemotron_recipes.executors.slurm import control
from nemotron_recipes.executors.slurm import handles as slurm_handle
from nemotron_recipes.executors.slurm.states import JobState
from nemotron_recipes.spec import JobHandle


@dataclass(frozen=True)
class Snapshot:
    """jobs: run folder -> stage -> job. unreachable: why slurmctld could not be asked; then it knows of none.

    unclear   run folder -> why it can't be told yet which jobs are the run's
    """

    jobs: Mapping[str, Mapping[str, str]]
    unclear: Mapping[str, str]
    known: Mapping[str, JobState] = field(default_factory=dict)
    unreachable: str = ""

    def states(self, handle: JobHandle) -> dict[str, JobState]:
        """Stage -> state of its job, in order, for those that Slurm knows. Unreachable when it could not be asked."""
        why = self.unreachable or self.unclear.get(handle.run_dir, "")
        if why:
            raise control.Unreachable(why)
        jobs = self.jobs[handle.run_dir]
        return {stage: self.known[job] for stage, job in jobs.items() if job in self.known}


def take(handles: Sequence[JobHandle]) -> Snapshot:
    """Ask once for all of them."""
    unclear = {}
    noted = []
    for handle in handles:
        try:
            noted.append(slurm_handle.recovered(handle))
        except control.Unreachable as error:
            unclear[handle.run_dir] = str(error)
    names = [name for handle in noted for name in _unnoted(handle).values()]
    named = control.jobs_named(*names) if names else {}
    jobs = {handle.run_dir: _jobs(handle, named) for handle in noted}
    try:
        known = control.job_states(job for each in jobs.values() for job in each.values())
    except control.Unreachable as error:
        return Snapshot(jobs, unclear, unreachable=str(error))
    return Snapshot(jobs, unclear, known)


def jobs_of(handle: JobHandle) -> dict[str, str]:
    """Stage -> job of one run."""
    names = _unnoted(handle).values()
    return _jobs(handle, control.jobs_named(*names) if names else {})


def one_by_one(handle: JobHandle) -> dict[str, JobState]:
    """`Snapshot.states` of one run, with a question per job. Unreachable when Slurm could not be asked."""
    jobs = jobs_of(slurm_handle.recovered(handle))
    found = known(jobs.values())
    return {stage: found[job] for stage, job in jobs.items() if job in found}


def known(jobs: Iterable[str]) -> dict[str, JobState]:
    """Job -> its state, for those that Slurm knows."""
    found = {job: control.job_state(job) for job in jobs}
    return {job: state for job, state in found.items() if state is not None}


def _unnoted(handle: JobHandle) -> dict[str, str]:
    """Stage -> name of its job, where no id is in the handle."""
    return {stage: name for stage, name in handle.native["names"].items() if stage not in handle.native["jobs"]}


def _jobs(handle: JobHandle, named: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """In the order in which Slurm took them: a file's keys have none.

    One that was accepted while its submitter died is in no handle, but has its name.
    """
    found = {stage: named[name][0] for stage, name in _unnoted(handle).items() if named.get(name)}
    return dict(sorted({**handle.native["jobs"], **found}.items(), key=lambda each: (len(each[1]), each[1])))
