"""What srun starts once on each node: python -m nemotron_recipes.executors.slurm.launch LAUNCH.json

It holds the node against the Plan, starts torchrun (or the one worker) with exactly the argv that the plan shows, and
says how it ended. The first node's launcher also writes the launcher's events (docs/contracts.md). It writes an end
only when it knows the cause: whoever is told to stop by Slurm cannot know why (time limit, scancel, another node), and
leaves that to later readers, who ask Slurm (outcome.py). Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from nemotron_recipes import sources
from nemotron_recipes.closing import end
from nemotron_recipes.errors import Unfinished
from nemotron_recipes.executors import torchrun, watchdog
from nemotron_recipes.executors.slurm import files, meeting, requeue
from nemotron_recipes.executors.slurm.files import NodeReport
from nemotron_recipes.executors.verdict import failure_cause
from nemotron_recipes.rundir import ATTEMPT_ENV, DEADLINE_ENV, RunDir, StageDir, append_event, read_json
from nemotron_recipes.spec import Tree

HOSTS_ENV = "NEMOTRON_HOSTS"  # the job's nodes, in order, as the batch script resolved them outside any container

OTHERS_SECONDS = 50.0  # for the other nodes to report; srun kills a step 60 s after its first task has ended
CLAIM_SECONDS = 30.0
STOP_ECHO_SECONDS = 5.0  # between the signal that ended a worker and the same one here
NEWS_SECONDS = 3.0  # the same after a failure, when srun is about to stop everything

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl(2)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Node:
    """One node of one attempt."""

    launch: Tree
    environ: dict[str, str]
    run: RunDir
    stage: StageDir
    attempt: int
    number: int
    host: str
    child: subprocess.Popen[bytes] | None = None
    restarts: int = 0  # how often the job was put back into the queue before this attempt
    deadline: float | None = None
    stopping: bool = False
    overdue: bool = False
    stalled: str = ""  # words on why the watchdog has stopped this node's processes
    hosts: list[str] = field(default_factory=list)
    port: int = 0  # where several nodes meet
    held: socket.socket | None = None  # keeps other jobs off that port, for as long as this launcher lives

    def work(self) -> int:
        """Check, run, report; the exit code of this task of the step."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        signal.signal(signal.SIGALRM, self._time_is_up)
        stray = self._unclaimed()
        if stray:  # the folder belongs to somebody else: nothing is written there
            print(f"{self.host}: {stray}", file=sys.stderr, flush=True)
            return 1
        self.stage.logs(self.attempt).mkdir(parents=True, exist_ok=True)
        self.hosts = self.environ.get(HOSTS_ENV, "").split()
        if self.number == 0 and self.restarts:
            self._tell_of_requeue()
        problem = requeue.used_up(self.restarts, self.launch["max_requeues"])
        problem = problem or self._misplaced() or self._changed_file() or self._meet()
        if problem:
            return self._refuse(problem)
        log = files.launcher_log(self.stage, self.attempt, self.number)
        began = time.monotonic()
        try:
            code = self._run(log)
        except OSError as error:
            return self._refuse(f"{self.launch['argv'][0]} can't be started: {error.strerror}")
        failure = torchrun.first_failure(log) if code else None
        rank, rank_code = failure or (None, None)
        if {code, rank_code} & {128 + number for number in STOP_SIGNALS}:
            self._expect_stop()
        report = NodeReport(self.number, self.host, time.time(), code, self.stopping, "", rank, rank_code, self.overdue)
        files.write_report(self.stage, self.attempt, report)
        return self._conclude(report, time.monotonic() - began) if self.number == 0 else code

    def _unclaimed(self) -> str:
        """A job whose submitter was told that sbatch failed, or died before it could note the id, must not train.

        The note follows sbatch's answer within milliseconds; a shared file system may show it later.
        """
        own, deadline = self.environ["SLURM_JOB_ID"], time.monotonic() + CLAIM_SECONDS
        while True:
            handle = read_json(self.run.handle) or {"native": {"jobs": {}}}
            known = handle["native"]["jobs"].get(self.launch["stage"])
            if known == own:
                return ""
            if known is not None:
                return f"job {own} is left over from an interrupted submission: the stage's job is {known}"
            if time.monotonic() > deadline:
                return f"job {own} is left over from a submission that was interrupted or taken back"
            time.sleep(0.1)

    def _tell_of_requeue(self) -> None:
        """Of one that Slurm made by itself, or somebody else: nobody in the job could say it then."""
        before, name = self.attempt - 1, self.launch["stage"]
        if not requeue.is_told(self.run, name, before):
            cause = requeue.ended_as(self.environ.get(requeue.ENDED_AS_ENV, ""))
            event = requeue.requeued_event(self.stage, name, before, cause, self.restarts)
            append_event(self.run.events, event.pop("event"), **{k: v for k, v in event.items() if k != "time"})

    def _misplaced(self) -> str:
        """Why this node is not one that the Plan speaks of; "" when it is."""
        wanted, environ = self.launch["nodes"], self.environ
        if not self.hosts:
            return f"the batch script named no hosts in {HOSTS_ENV}: `scontrol show hostnames` must work where it runs"
        if len(self.hosts) != wanted:
            return f"the plan has {wanted} node(s), but Slurm gave {len(self.hosts)}: {' '.join(self.hosts)}"
        tasks = int(environ.get("SLURM_NTASKS", "1"))
        if tasks != wanted:
            return f"one task per node makes {wanted} task(s), but srun started {tasks}"
        if self.number >= wanted or self.hosts[self.number] != self.host:
            return f"{self.host} is node {self.number} of the step, but the job's nodes are {' '.join(self.hosts)}"
        gpus, found = self.launch["gpus_per_node"], environ.get("SLURM_GPUS_ON_NODE")
        if gpus and found and found.isdecimal() and int(found) != gpus:
            return f"the plan has {gpus} GPU(s) per node, but {self.host} gave {found}"
        return ""

    def _changed_file(self) -> str:
        """What runs is what was shown: which file is not as rendered any more."""
        rendered = read_json(self.run.rendered) or {"stages": []}
        for stage in rendered["stages"]:
            if stage["name"] != self.launch["stage"]:
                continue
            for name, text in stage["files"].items():
                path = Path(name)
                if not path.is_file() or path.read_bytes() != text.encode():
                    return f"{path} was changed after it had been planned"
            return self._changed_code() if self.number == 0 else ""
        return f"{self.run.rendered} does not name stage {self.launch['stage']}"

    def _changed_code(self) -> str:
        plan = read_json(self.run.plan)
        other = sources.changed(self.run.path, plan["code"]["digest"]) if plan else ""
        return f"the code in {other} was changed after it had been planned" if other else ""

    def _meet(self) -> str:
        """Agree on a port with the other nodes; why that did not work, else ""."""
        if self.launch["nodes"] == 1 or self.launch["launcher"] != "torchrun":
            return ""
        job = self.environ["SLURM_JOB_ID"]
        try:
            if self.number == 0:
                self.held, self.port = meeting.hold_port(self.stage, self.attempt, job)
            else:
                self.port = meeting.told_port(self.stage, self.attempt, job, lambda: self.stopping)
        except meeting.NoMeeting as error:
            return str(error)
        return ""

    def _run(self, log: Path) -> int:
        environ = stage_environment(self.launch, self.run, self.environ)
        environ[ATTEMPT_ENV] = str(self.attempt)
        self.deadline = requeue.deadline_of(self.environ, self.launch["save_margin"], time.time())
        if self.deadline is not None:
            environ[DEADLINE_ENV] = f"{self.deadline:.3f}"
        if self.port:
            environ |= {"PET_NODE_RANK": str(self.number), "PET_MASTER_ADDR": self.hosts[0]}
            environ["PET_MASTER_PORT"] = str(self.port)
        with open(log, "ab") as output:
            # In a session of its own: Slurm signals the launcher's, and torchrun must hear of a stop only once.
            child = subprocess.Popen(
                self.launch["argv"],
                cwd=self.launch["workdir"] or self.launch["cwd"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_stop_with_launcher,  # this process has no threads
            )
        self.child = child
        if self.number == 0:
            self._event("stage-started", pid=child.pid, job=self.environ["SLURM_JOB_ID"], hosts=self.hosts)
        if self.stopping:  # it came before there was anything to stop
            child.terminate()
        if self.deadline is not None:  # for workers that do not look at the clock
            alarm = requeue.alarm_of(self.environ, self.deadline)
            signal.setitimer(signal.ITIMER_REAL, max(0.001, alarm - time.time()))
        code = self._wait(child)
        signal.setitimer(signal.ITIMER_REAL, 0)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # what the process left behind
        return code if code >= 0 else 128 - code

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        """Until the child has ended; one whose ranks hang is ended."""
        if not self.launch["watchdog"]:
            return child.wait()
        factor, minimum = self.launch["stall"]
        dog = watchdog.Watchdog(
            *(self.launch["watchdog"], factor, minimum, self.run, self.stage, self.launch["stage"], self.attempt),
            first=self.number == 0,
        )
        while not self.stalled:
            with suppress(subprocess.TimeoutExpired):
                return child.wait(watchdog.LOOK_SECONDS)
            self.stalled = dog.look(child.pid)
            if (code := child.poll()) is not None:  # it ended while its stacks were collected
                self.stalled = ""
                return code
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            return child.wait(watchdog.KILL_SECONDS)
        watchdog.kill_tree(child.pid)
        return child.wait()

    def _conclude(self, own: NodeReport, seconds: float) -> int:
        """The first node's: events, once every node has reported or can't be waited for any longer."""
        in_time = self.overdue or own.code in (0, Unfinished.exit_code)
        self._wait_for_others(OTHERS_SECONDS if in_time and (self.overdue or not self.stopping) else NEWS_SECONDS)
        reports = files.read_reports(self.stage, self.attempt)
        silent = [host for number, host in enumerate(self.hosts) if number not in {r.node for r in reports}]
        first = files.first_failure(reports)
        code = own.exit_code or (first.exit_code if first else 0) or (1 if silent else 0)
        told: Tree = {"exit_code": code, "seconds": round(seconds, 3)}
        if first and first.rank is not None:
            told |= {"rank": first.rank, "rank_exit_code": first.rank_exit_code}
        cause = self.stalled or self._cause(code, first, silent)
        wish = requeue.wish_of(reports, self.launch["nodes"], self.deadline) if cause else ""
        if self.stalled:
            wish = requeue.STALLED if self.launch["watchdog"] == "requeue" else ""
        if wish and self.restarts < self.launch["max_requeues"] and self._ask_for_requeue(wish, told):
            return Unfinished.exit_code
        self._event("stage-exited", **told)
        if wish and wish not in (requeue.SIGNAL, requeue.STALLED):
            how = {"scheduler": "TIMEOUT"} if wish == requeue.TIME_LIMIT else {}
            cause = requeue.given_up(wish, self.launch["max_requeues"])
            self._finish("failed", stage=self.launch["stage"], cause=cause, **how)
        elif own.stopped and cause and not self.stalled and not (first and first.time <= own.time):
            return code or 1
        elif cause:
            self._finish("failed", stage=self.launch["stage"], cause=cause)
        elif self.launch["stage"] == [*files.attempts(self.run)][-1]:
            self._finish("succeeded")
        else:
            return code
        return code or (1 if cause else 0)  # what follows must not start

    def _cause(self, code: int, first: NodeReport | None, silent: list[str]) -> str:
        if first and first.problem:
            return f"{first.host}: {first.problem}"
        log = files.launcher_log(self.stage, self.attempt, first.node if first else 0)
        failure = None
        if first and first.rank is not None and first.rank_exit_code is not None:
            failure = torchrun.RankFailure(first.rank, first.rank_exit_code)
        cause = failure_cause(self.stage, self.launch["fingerprint"], self.attempt, code, failure, log)
        if silent:
            cause = f"{cause}; " if cause else ""
            cause += f"no word from {', '.join(silent)}: it may be down"
        return cause

    def _ask_for_requeue(self, cause: str, told: Tree) -> bool:
        fields = {"stage": self.launch["stage"], "attempt": self.attempt, **told}
        exited = {"time": round(time.time(), 3), "event": "stage-exited", **fields}
        requeued = requeue.requeued_event(
            *(self.stage, self.launch["stage"], self.attempt, cause), requeues=self.restarts + 1
        )
        return requeue.leave_wish(self.environ, [exited, requeued])

    def _refuse(self, problem: str) -> int:
        print(f"{self.host}: {problem}", file=sys.stderr, flush=True)
        report = NodeReport(self.number, self.host, time.time(), 1, self.stopping, problem)
        files.write_report(self.stage, self.attempt, report)
        if self.number == 0:
            cause = f"{self.host}: {problem}"
            self._finish("failed", stage=self.launch["stage"], cause=cause)
        return 1

    def _finish(self, state: str, **fields: object) -> None:
        """The run's end. First its secrets go: whoever hears of the end may submit again, with secrets of its own."""
        files.secrets(self.run).unlink(missing_ok=True)
        end(self.run, "finished", state=state, **fields)

    def _wait_for_others(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(files.read_reports(self.stage, self.attempt)) >= self.launch["nodes"]:
                return
            time.sleep(0.1)

    def _event(self, name: str, **fields: object) -> None:
        append_event(self.run.events, name, stage=self.launch["stage"], attempt=self.attempt, **fields)

    def _expect_stop(self) -> None:
        """Slurm signals each process of a step in turn: a worker may have ended of it before this one has heard."""
        deadline = time.monotonic() + STOP_ECHO_SECONDS
        while not self.stopping and time.monotonic() < deadline:
            time.sleep(0.05)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            return  # Slurm repeats itself; the workers take a second wish to stop for impatience
        self.stopping = True
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()

    def _time_is_up(self, number: int, frame: FrameType | None) -> None:
        self.overdue = not self.stopping
        self._stop(number, frame)


def stage_environment(launch: Tree, run: RunDir, inherited: dict[str, str]) -> dict[str, str]:
    """What a stage's processes get: the job's own, the secrets, and above all what the plan sets."""
    environ = {**inherited, **(read_json(files.secrets(run)) or {}), **launch["env"]}
    if "PYTHONPATH" in launch["env"]:  # an image's own, or a module's, may be needed
        environ["PYTHONPATH"] = _joined(launch["env"]["PYTHONPATH"], inherited.get("PYTHONPATH", ""))
    return environ


def _joined(first: str, then: str) -> str:
    """Search paths, each once, in that order."""
    return os.pathsep.join(dict.fromkeys(entry for entry in f"{first}{os.pathsep}{then}".split(os.pathsep) if entry))


def _stop_with_launcher() -> None:
    """In the child: hear SIGTERM when the launcher is killed; without cgroups nobody else would stop it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    """Carry out this node's part of the stage whose launch file is the only argument."""
    (path,) = argv if argv is not None else sys.argv[1:]
    launch = json.loads(Path(path).read_text(encoding="utf-8"))
    run = RunDir(Path(launch["run_dir"]))
    environ = dict(os.environ)
    attempt = files.attempts(run).get(launch["stage"])
    if attempt is None:
        print(f"the submission of {launch['stage']} in {run.path} was taken back", file=sys.stderr)
        return 1
    restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
    attempt += restarts
    host = environ.get("SLURMD_NODENAME") or socket.gethostname()
    number = int(environ.get("SLURM_NODEID", "0"))
    stage = StageDir(Path(launch["cwd"]))
    try:
        return Node(launch, environ, run, stage, attempt, number, host, restarts=restarts).work()
    except OSError as error:  # a full disk: readers see the end by what Slurm says of the job
        print(f"{host}: this attempt can't be recorded in {run.path}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
