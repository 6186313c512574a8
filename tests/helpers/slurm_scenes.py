"""A real Slurm with jobs of every kind and state, and what our code hears of them."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

from slurm.releases import of_program
from slurm.services import program
from tests.helpers import slurm
from tests.helpers.slurm import Cluster, manage, wait_for
from tests.helpers.slurm_answers import TOKEN, Recording, ask_all, recorded

QOS = {  # name -> its limits
    "jobs": "MaxJobsPerUser=1",
    "gpus": "MaxTRESPerUser=gres/gpu=1",
    "wall": "MaxWall=1",
    "nodes": "GrpTRES=node=1",
    "cpus": "MaxTRESPerJob=cpu=1",
    "least": "MinTRESPerJob=cpu=4",
    "once": "MaxSubmitJobsPerUser=1",
    "used": "GrpTRESMins=cpu=0",
}
SETTINGS = {
    "EnforcePartLimits": "NO",
    "AccountingStorageEnforce": "associations,limits,qos",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "CANCEL",
    "Licenses": "compiler:1",
    "MinJobAge": "3600",
    "JobAcctGatherFrequency": "task=1",
    "JobAcctGatherParams": "OverMemoryKill",
    "SelectTypeParameters": "CR_Core_Memory",
    "DefMemPerCPU": "100",
}
PARTITIONS = (  # each scene has nodes of its own, so that no job waits for another's
    "work Nodes=node1",
    "pair Nodes=node[1,6]",  # components don't share a node
    "one Nodes=node1 MaxTime=10",
    "full Nodes=node2 MaxTime=60",
    "low Nodes=node3 PriorityTier=1",
    "urgent Nodes=node3 PriorityTier=9",
    "dying Nodes=node[4-5]",
    "closing Nodes=node1",
    "resting Nodes=node1",
    "exclusive Nodes=node1 AllowQos=jobs",
)
FLAGS = ("--nodes=6", "--cpus-per-node=32", "--gpus-per-node=2", "--account=lab", "--account=poor", "--account=idle")
SLEEP = "sleep 3000"
EAT = "python3 -c 'import time; held = b\"x\" * 400_000_000; time.sleep(300)'"


def record(folder: Path) -> Recording:
    """Everything, by the Slurm that comes first on the PATH, in some three minutes. folder: where jobs write."""
    found = Recording(of_program(program("slurmctld")).version)
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    with slurm.cluster(*FLAGS, *settings) as cluster, mock.patch.dict(os.environ, cluster.env, clear=True):
        jobs = Jobs(cluster, folder, "lab").of_every_kind()
        _record(found, "whole", cluster, jobs)
        found.logs = {name: _log(folder / f"{jobs[name]}.out") for name in LOGS}
        few = {name: jobs[name] for name in ("completed", "failed", "held")}
        for daemon in ("slurmdbd", "slurmctld"):
            manage("kill-daemon", daemon, folder=cluster.folder)
            _record(found, f"without {daemon}", cluster, few)
    with (
        slurm.cluster("--nodes=1", "--no-accounting") as cluster,
        mock.patch.dict(os.environ, cluster.env, clear=True),
    ):
        plain = Jobs(cluster, folder)
        plain.submit("failed", "exit 3")
        plain.submit("held", SLEEP, "--hold")
        cluster.wait(plain.ids["failed"])
        _record(found, "without accounting", cluster, plain.ids)
    return found


def _log(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _record(found: Recording, scene: str, cluster: Cluster, jobs: dict[str, str]) -> None:
    found.jobs[scene] = dict(jobs)
    with recorded(found, scene, cluster.folder):
        ask_all(jobs, scene)


class Jobs:
    """Jobs of one cluster, by name."""

    def __init__(self, cluster: Cluster, folder: Path, account: str = ""):
        self.cluster, self.folder = cluster, folder
        self.account = (f"--account={account}",) if account else ()
        self.ids: dict[str, str] = {}

    def submit(self, name: str, script: str, *flags: str) -> str:
        where: tuple[str, ...] = ()
        if self.account and not any(flag.startswith("--partition") for flag in flags):
            where = ("--partition=work",)
        if not any(flag.startswith("--account") for flag in flags):
            where += self.account
        self.ids[name] = self.cluster.sbatch(script, f"--job-name={name}", *where, *flags, cwd=self.folder)
        return self.ids[name]

    def of_every_kind(self) -> dict[str, str]:
        """All of them, as they stand once each has come to where it is going."""
        try:
            self._prepare()
            self._long_ones()
            self._ended()
            self._together()
            self._held_up()
            self._limited()
            self._struck()
            self._settled()
        except AssertionError as error:
            shown = self.cluster.run("squeue", "--all", "--format=%i %P %j %T %r %N").stdout
            raise AssertionError(f"{error}\n{shown}") from None
        return self.ids

    def _control(self, *words: str, code: int | None = 0) -> None:
        self.cluster.run("scontrol", *words, code=code)

    def _prepare(self) -> None:
        for name, limits in QOS.items():
            self.cluster.run("sacctmgr", "-i", "add", "qos", name, "set", limits)
        for words in PARTITIONS:
            name, _, rest = words.partition(" ")
            self._control("create", f"PartitionName={name}", "State=UP", *rest.split())
        names = ",".join(QOS)
        self.cluster.run("sacctmgr", "-i", "modify", "user", "where", "account=lab", "set", f"qos+={names}")
        for account, limits in {"poor": ("MaxTRESPerJob=node=1", "MaxWall=60"), "idle": ("GrpJobs=0",)}.items():
            self.cluster.run("sacctmgr", "-i", "modify", "account", account, "set", *limits)
        self._control("update", "NodeName=node1", "AvailableFeatures=fast", "ActiveFeatures=fast")

    def _long_ones(self) -> None:
        """What takes a minute or more to come to its end."""
        self.submit("timeout", SLEEP, "--time=1")
        self.submit("memory", EAT, "--mem=100")
        self.submit("memory of a step", f"srun {EAT}", "--mem=100")

    def _ended(self) -> None:
        self.submit("completed", "true")
        self.submit("no pyxis", "srun --container-image=image.sqsh true")
        self.submit("failed", "exit 3")
        self.submit("signal", "kill -KILL $$")
        self.submit("no output", "true", "--output=/proc/nowhere/out")
        self.submit("cancelled", SLEEP)
        self.cluster.wait(self.ids["cancelled"], "RUNNING")
        self.cluster.run("scancel", self.ids["cancelled"])
        self.submit("cancelled before", SLEEP, "--hold")
        self.cluster.run("scancel", self.ids["cancelled before"])

    def _together(self) -> None:
        """Arrays, jobs of several components, dependencies."""
        self.submit("array", 'test "$SLURM_ARRAY_TASK_ID" != 1 || exit 2; test "$SLURM_ARRAY_TASK_ID" = 3 && '
                             f"{SLEEP}; true", "--array=1-5%1")  # fmt: skip
        self.submit("array done", "true", "--array=0-1")
        self.submit("array waits", SLEEP, "--array=0-3%1", "--hold")
        script = "#!/bin/bash\n#SBATCH --ntasks=1\n#SBATCH hetjob\n#SBATCH --ntasks=1\n"
        for name, command in (("components", SLEEP), ("components done", "true")):
            self.ids[name] = self.cluster.run(
                *("sbatch", "--parsable", f"--job-name={name}", "--partition=pair", "--output=%j.out"),
                cwd=self.folder,
                input=f"{script}{command}\n",
            ).stdout.strip()
        held, failed = self.ids["cancelled before"], self.ids["failed"]
        self.cluster.wait(failed)
        self.submit("named", SLEEP, "--hold", f"--comment=text of mine {TOKEN}")
        waits = self.ids["named"]
        self.submit("dependency", "true", f"--dependency=afterok:{waits}")
        self.submit("never", "true", f"--dependency=afterok:{failed}", "--kill-on-invalid-dep=no")
        self.submit("killed", "true", f"--dependency=afterok:{failed}", "--kill-on-invalid-dep=yes")
        self.submit("afterany", "true", f"--dependency=afterany:{failed}")
        self.submit("afternotok", "true", f"--dependency=afternotok:{failed}")
        self.submit("after", "true", f"--dependency=after:{waits}")
        self.submit("aftercorr", "true", f"--dependency=aftercorr:{waits}")
        self.submit("either", "true", f"--dependency=afterok:{failed}?afterany:{held}")
        self.submit("singleton", "true", "--job-name=named", "--dependency=singleton", "--comment=nemotron=of-another")

    def _held_up(self) -> None:
        """What waits for anything but a limit of the accounting."""
        self.submit("held", SLEEP, "--hold")
        self.submit("later", SLEEP, "--begin=now+2hours")
        self.submit("running", SLEEP, "--nodes=1", "--exclusive", "--partition=full", "--time=50")
        self.cluster.wait(self.ids["running"], "RUNNING")
        self.submit("resources", SLEEP, "--partition=full", "--time=50")
        self.submit("priority", SLEEP, "--partition=full", "--time=50", "--nice=1000")
        self.submit("deadline", SLEEP, "--partition=full", "--time=1", "--deadline=now+61seconds")
        self.submit("partition time", SLEEP, "--partition=one", "--time=1:00:00")
        with suppress(AssertionError):  # from 24.05 on it is refused at once
            self.submit("partition nodes", SLEEP, "--partition=one", "--nodes=2", "--time=5")
        self.submit("partition qos", SLEEP, "--partition=exclusive", "--qos=normal")
        self.submit("partition down", SLEEP, "--partition=closing", "--hold")
        self._control("update", "PartitionName=closing", "State=DOWN")
        self._control("release", self.ids["partition down"], code=None)  # it says that this can't start now
        self.submit("partition inactive", SLEEP, "--partition=resting", "--hold")
        self._control("update", "PartitionName=resting", "State=INACTIVE")
        self._control("release", self.ids["partition inactive"], code=None)
        self.submit("licence", SLEEP, "--licenses=compiler:1")
        self.cluster.wait(self.ids["licence"], "RUNNING")
        self.submit("licences", SLEEP, "--licenses=compiler:1")
        self._control("create", "ReservationName=later", "StartTime=now+2hours", "Duration=60", "Users=root",
                      "Nodes=node6", "Flags=IGNORE_JOBS")  # fmt: skip
        self.submit("reservation", SLEEP, "--reservation=later", "--partition=pair")
        self.submit("constraint", SLEEP, "--constraint=fast", "--hold")
        self._control("update", "NodeName=node1", "AvailableFeatures=slow", "ActiveFeatures=slow")
        self._control("release", self.ids["constraint"])
        self.submit("suspended", SLEEP)
        self.cluster.wait(self.ids["suspended"], "RUNNING")
        self._control("suspend", self.ids["suspended"])
        self.submit("put back", SLEEP, "--requeue")
        self.submit("put back and held", SLEEP, "--requeue")
        self.submit("special", SLEEP, "--requeue")
        for name in ("put back", "put back and held", "special"):
            self.cluster.wait(self.ids[name], "RUNNING")
        self._control("requeuehold", self.ids["put back and held"])
        self._control("requeuehold", "State=SpecialExit", self.ids["special"])

    def _limited(self) -> None:
        """What waits for a limit of the accounting, or can never keep it."""
        for number in (1, 2):
            self.submit(f"jobs {number}", SLEEP, "--qos=jobs")
            self.submit(f"nodes {number}", SLEEP, "--qos=nodes", "--exclusive=user")
        self.submit("gpus", SLEEP, "--qos=gpus", "--gpus-per-node=2")
        self.submit("wall", SLEEP, "--qos=wall", "--time=10")
        self.submit("nodes of two", SLEEP, "--qos=nodes", "--nodes=2", "--partition=batch")
        self.submit("cpus", SLEEP, "--qos=cpus", "--ntasks=2")
        self.submit("least", SLEEP, "--qos=least", "--ntasks=1")
        self.submit("used", SLEEP, "--qos=used")
        self.submit("once", SLEEP, "--qos=once", "--hold")
        self.submit("poor", SLEEP, "--account=idle")
        self.submit("poor nodes", SLEEP, "--account=poor", "--nodes=2", "--partition=batch")
        self.submit("poor time", SLEEP, "--account=poor", "--time=5:00:00")

    def _struck(self) -> None:
        """Preempted, and on a node that dies."""
        self.submit("preempted", SLEEP, "--partition=low", "--exclusive", "--no-requeue")
        self.cluster.wait(self.ids["preempted"], "RUNNING")
        self.submit("preempting", SLEEP, "--partition=urgent", "--exclusive")
        script = f"srun bash -c 'echo began; {SLEEP}'"
        self.submit("node failure", script, "--partition=dying", "--nodes=2", "--ntasks=2", "--no-requeue")
        self.submit("node failure, back", SLEEP, "--partition=dying", "--nodelist=node5", "--requeue")
        for name in ("node failure", "node failure, back"):
            self.cluster.wait(self.ids[name], "RUNNING")
        step = Path(self.folder, f"{self.ids['node failure']}.out")
        wait_for(lambda: step.exists() and step.read_text().count("began") == 2, "both tasks to have begun")
        manage("kill-node", "5", "--noticed", folder=self.cluster.folder)
        self.submit("dead node", SLEEP, "--partition=dying", "--nodelist=node5")

    def _settled(self) -> None:
        """Until what ends has ended, and each that waits has its reason; the accounting has heard of all."""
        for name in ENDS:
            self.cluster.wait(self.ids[name], *slurm.OVER, "PREEMPTED", seconds=240)
        for name in ("array", "array done", "components", "components done", "preempting"):
            wait_for(lambda name=name: self._parts(name, "RUNNING", "COMPLETED"), f"{name} to have begun", 120)
        self.submit("put back again", SLEEP, "--requeue")
        self.cluster.wait(self.ids["put back again"], "RUNNING")
        self._control("requeue", self.ids["put back again"])
        self._control("update", f"JobId={self.ids['put back again']}", "StartTime=now+2hours")
        waiting = [name for name in REASONS if name in self.ids]
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:  # a scheduler's turn, every few seconds, finds the reasons
            said = {name: self._reason(name) for name in waiting}
            if all(said[name] == REASONS[name] for name in waiting):
                break
            time.sleep(1)
        ended = [self.ids[name] for name in ENDS]
        argv = ("sacct", "-X", "--noheader", "--parsable2", f"--jobs={','.join(ended)}", "--format=State")
        going = ("PENDING", "RUNNING")
        wait_for(lambda: not {*self.cluster.run(*argv).stdout.split()} & {*going}, "sacct to know the ends")

    def _parts(self, name: str, *states: str) -> bool:
        said = self.cluster.run("squeue", "--noheader", "--states=all", f"--jobs={self.ids[name]}", "--format=%T")
        return any(state in said.stdout.split() for state in states)

    def _reason(self, name: str) -> str:
        argv = ("squeue", "--noheader", "--states=all", f"--jobs={self.ids[name]}", "--Format=Reason:64")
        return self.cluster.run(*argv).stdout.splitlines()[0].strip()


LOGS = ("timeout", "node failure", "preempted", "no pyxis", "memory", "memory of a step", "cancelled")
ENDS = (
    *("completed", "failed", "no pyxis", "signal", "no output", "cancelled", "cancelled before", "killed", "afterany"),
    *("afternotok", "timeout", "preempted", "node failure", "array done", "components done"),
)
REASONS = {  # name -> the code that squeue gives
    "held": "JobHeldUser",
    "later": "BeginTime",
    "resources": "Resources",
    "priority": "Priority",
    "dependency": "Dependency",
    "never": "DependencyNeverSatisfied",
    "singleton": "Dependency",
    "partition time": "PartitionTimeLimit",
    "partition nodes": "PartitionNodeLimit",
    "partition down": "PartitionDown",
    "partition inactive": "PartitionInactive",
    "licences": "Licenses",
    "reservation": "Reservation",
    "jobs 2": "QOSMaxJobsPerUserLimit",
    "gpus": "QOSMaxGRESPerUser",
    "wall": "QOSMaxWallDurationPerJobLimit",
    "nodes of two": "QOSGrpNodeLimit",
    "cpus": "QOSMaxCpuPerJobLimit",
    "least": "QOSMinCpuNotSatisfied",
    "used": "QOSGrpCPUMinutesLimit",
    "poor": "AssocGrpJobsLimit",
    "poor nodes": "AssocMaxNodePerJobLimit",
    "poor time": "AssocMaxWallDurationPerJobLimit",
    "put back again": "BeginTime",
    "dead node": "ReqNodeNotAvail, UnavailableNodes:node5",
}


def main() -> None:
    """Replace the recording of the Slurm that comes first on the PATH."""
    with tempfile.TemporaryDirectory(prefix="slurm-recorded-") as folder:
        found = record(Path(folder))
    series = ".".join(found.version.split(".")[:2])
    path = Path(__file__).parents[1] / "recorded" / f"slurm-{series}" / "answers.json"
    found.save(path)
    print(f"Slurm {found.version}: {path}")


if __name__ == "__main__":
    main()
