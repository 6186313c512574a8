"""What is true of the jobs of tests/helpers/slurm_scenes.py, and so must be made of any Slurm's answers about them."""

from __future__ import annotations

from typing import Any

from nemotron_recipes.artifacts.causes import recognised
from nemotron_recipes.executors.slurm import control, limits
from nemotron_recipes.executors.slurm import site as slurm_site
from nemotron_recipes.executors.slurm import states as slurm_states
from nemotron_recipes.executors.slurm.control import JobState
from nemotron_recipes.spec import Wait
from tests.helpers.slurm_answers import REFUSED, Recording, Replay, ask_all
from tests.helpers.slurm_scenes import PARTITIONS, REASONS

# name -> state, whether it may still run, (exit code, signal) of one that failed by itself
STATES: dict[str, tuple[str, bool, tuple[int, int]]] = {
    "completed": ("COMPLETED", False, (0, 0)),
    "failed": ("FAILED", False, (3, 0)),
    "signal": ("FAILED", False, (0, 9)),
    "cancelled": ("CANCELLED", False, (0, 0)),
    "cancelled before": ("CANCELLED", False, (0, 0)),
    "timeout": ("TIMEOUT", False, (0, 0)),
    "preempted": ("PREEMPTED", False, (0, 0)),
    "node failure": ("NODE_FAIL", False, (0, 0)),
    "array": ("RUNNING", True, (0, 0)),
    "array done": ("COMPLETED", False, (0, 0)),
    "array waits": ("PENDING", True, (0, 0)),
    "components": ("RUNNING", True, (0, 0)),
    "components done": ("COMPLETED", False, (0, 0)),
    "never": ("PENDING", False, (0, 0)),
    "killed": ("CANCELLED", False, (0, 0)),
    "afterany": ("COMPLETED", False, (0, 0)),
    "afternotok": ("COMPLETED", False, (0, 0)),
    "either": ("COMPLETED", False, (0, 0)),
    "dependency": ("PENDING", True, (0, 0)),
    "after": ("PENDING", True, (0, 0)),
    "aftercorr": ("PENDING", True, (0, 0)),
    "singleton": ("PENDING", True, (0, 0)),
    "suspended": ("SUSPENDED", True, (0, 0)),
    "put back again": ("PENDING", True, (0, 0)),
    "put back and held": ("PENDING", True, (0, 0)),
    "special": ("SPECIAL_EXIT", True, (0, 0)),
    "node failure, back": ("PENDING", True, (0, 0)),
    "running": ("RUNNING", True, (0, 0)),
    "held": ("PENDING", True, (0, 0)),
}


LIMITS = {  # name -> what is said of the limit that it hits
    "jobs 2": "1",
    "gpus": "1 gres/gpu",
    "wall": "run.time=",
    "cpus": "at most 1 cpu",
    "least": "at least 4 cpu",
    "poor nodes": "at most 1 node",
    "poor time": "run.time=",
    "partition time": "run.time=00:10:00",
    "partition nodes": "run.nodes=1",
}
REFUSED_BY_SOME = {"partition nodes"}  # by newer ones at once
CAUSES = {
    "timeout": "time-limit",
    "preempted": "preempted",
    "node failure": "node-failure",
    "no pyxis": "missing-pyxis",
}


class Truth:
    """One recording, and what our code makes of it."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self._told: dict[str, dict[str, Any]] = {}

    def told(self, scene: str = "whole") -> dict[str, Any]:
        if scene not in self._told:
            with Replay(self.recording, scene)():
                self._told[scene] = ask_all(self.recording.jobs[scene], scene)
        return self._told[scene]

    def check_states(self) -> None:
        """By one question for all, and by one for each."""
        jobs, told = self.recording.jobs["whole"], self.told()
        together = {name: facts(told["states"][jobs[name]]) for name in STATES}
        each = {name: facts(told[f"state of {name}"]) for name in STATES}
        assert together == each == STATES

    def check_reasons(self) -> None:
        """Each job waits for what it was made to wait for; every code is known, and a limit comes with its numbers."""
        told, jobs = self.told(), self.recording.jobs["whole"]
        assert {*REASONS} - {*jobs} <= REFUSED_BY_SOME
        for name, code in REASONS.items():
            if name not in jobs:
                continue
            wait: Wait = told[f"wait of {name}"]
            assert wait.reason.partition(",")[0] == code.partition(",")[0], name
            assert not wait.words.startswith("Slurm says"), f"{name}: {wait}"
        for name, number in LIMITS.items():
            if name not in jobs:
                continue
            wait = told[f"wait of {name}"]
            assert number in " ".join((*wait.limits, *wait.fits)), f"{name}: {wait}"

    def check_doctor(self) -> None:
        """What is not there is not called a problem, and MPI types are told."""
        found = {finding.topic: finding for finding in self.told()["doctor"].findings}
        assert [finding for finding in found.values() if finding.state == "problem"] == []
        assert "pmi2" in found["MPI types"].text
        assert self.told()["doctor"].suggestion["gpus_per_node"] == 2

    def check_questions(self) -> None:
        """By name, by token, about a job that nobody knows."""
        told, jobs = self.told(), self.recording.jobs["whole"]
        assert told["unknown job"] is None
        assert told["unknown jobs"] == {}
        assert {*told["named"]} == {"named"}
        assert {*told["named"]["named"]} == {jobs["named"], jobs["singleton"]}
        assert told["token"] == jobs["named"]
        assert told["no token"] is None
        assert told["cancel"] is None
        assert {"lab|jobs", "lab|normal", "idle|normal"} <= {*told["queued"].split()}
        for name in {"partition time", "partition nodes"} & {*jobs}:
            assert told[f"state of {name}"].impossible

    def check_site(self) -> None:
        """Partitions, nodes, accounts, limits."""
        told = self.told()
        site: slurm_site.Site = told["site"]
        assert self.recording.version.startswith(site.version)
        assert {words.split()[0] for words in PARTITIONS} <= {partition.name for partition in site.partitions}
        states = {name: site.partition(name).state for name in ("batch", "closing", "resting")}
        assert states == {"batch": "UP", "closing": "DOWN", "resting": "INACTIVE"}
        assert {kind.gpus for kind in site.nodes} == {2}
        assert sum(kind.count for kind in site.nodes) == 6
        assert sum(kind.count for kind in site.nodes if kind.down) == 1
        assert {a.account for a in site.associations or ()} >= {"lab", "poor", "idle"}
        policy: limits.Policy = told["policy"]
        assert policy.qos["jobs"].holder.limits == {"MaxJobs": "1"}
        assert policy.qos["gpus"].holder.limits == {"MaxTRESPU gres/gpu": "1"}
        assert policy.qos["least"].holder.limits == {"MinTRES cpu": "4"}
        assert policy.accounts["idle"].holder.limits["GrpJobs"] == "0"

    def check_refusals(self) -> None:
        """What sbatch does not take is refused in so many words, which are not those of a dead slurmctld."""
        for name in REFUSED:
            said = self.told()[f"sbatch {name}"]
            assert said["code"], (name, said)
            assert not control.is_silence(said["err"]), (name, said)

    def check_silence(self) -> None:
        """Without slurmctld nobody knows; without slurmdbd, or accounting, slurmctld alone does."""
        told = self.told("without slurmctld")
        assert isinstance(told["states"], control.Unreachable)
        assert isinstance(told["site"], control.Unreachable)
        assert control.is_silence(told["sbatch partition"]["err"])
        for scene in ("without slurmdbd", "without accounting"):
            told, jobs = self.told(scene), self.recording.jobs[scene]
            assert facts(told["states"][jobs["failed"]]) == STATES["failed"]
            assert facts(told["state of failed"]) == STATES["failed"]
            assert facts(told["states"][jobs["held"]]) == STATES["held"]
            assert not slurm_states.differs(told["state of failed"])
            assert told["unknown job"] is None

    def check_causes(self) -> None:
        """What jobs' own logs say of their ends."""
        logs = self.recording.logs
        found = {name: recognised(logs[name]) for name in CAUSES}
        assert {name: cause.name if cause else logs[name] for name, cause in found.items()} == CAUSES
        for name in ("memory", "memory of a step"):  # where this Slurm, without cgroups, has noticed
            cause = recognised(logs[name])
            assert logs[name] == "" or (cause and cause.name == "out-of-memory"), logs[name]


def facts(state: JobState) -> tuple[str, bool, tuple[int, int]]:
    """State, whether it may still run, (exit code, signal) of one that failed by itself."""
    code = (state.exit_code, state.signal) if state.state == "FAILED" else (0, 0)
    return state.state, state.active, code
