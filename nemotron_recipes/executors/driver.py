"""The process that carries out a submitted run on this machine: python -m nemotron_recipes.executors.driver RUN_DIR

It outlives the terminal, reads plan.json and rendered.json, runs the stages in order, and writes events.jsonl
(docs/contracts.md). How a stage is started and stopped is its executor's `Runner`.

Exit codes: 0 done, 1 a stage failed, 130 cancelled, 3 somebody else runs this run.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from nemotron_recipes import sources
from nemotron_recipes.closing import close
from nemotron_recipes.executors import DEFAULT_GRACE_SECONDS, memory, torchrun
from nemotron_recipes.executors.local import process_tree
from nemotron_recipes.executors.verdict import failure_cause, is_done
from nemotron_recipes.rundir import RunDir, StageDir, append_event, latest_checkpoint, read_json, write_sealed
from nemotron_recipes.spec import JobHandle, RenderedStage, Tree

BUSY = 3
RUNNERS = {
    "local": "nemotron_recipes.executors.local.runner:LocalRunner",
    "docker": "nemotron_recipes.executors.docker.runner:DockerRunner",
}

_LEAVING_SECONDS = 3.0
_POLL_SECONDS = 0.5
_MEMORY_POLL_SECONDS = 0.1  # a load fills several GiB a second


class Stopped(Exception):
    """A signal asked the driver to stop."""


class StageFailed(Exception):
    """The stage did not succeed; the text is the cause. `ended_by`: who ended it, where neither the stage did nor a
    person, so that its exit code and its record don't say why."""

    def __init__(self, cause: str, ended_by: str = ""):
        super().__init__(cause)
        self.ended_by = ended_by


class Started(Protocol):
    """One attempt of a stage that has been started."""

    told: Tree  # what finds it: {"pid": ...}, {"container": ...}

    def make_known(self) -> None:
        """What takes a while, and can be done while it runs. Whatever this raises ends the stage."""
        ...

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, looked at for at most that long."""
        ...

    def ask(self) -> None:
        """SIGTERM; does not wait."""
        ...

    def stop(self, grace: float) -> None:
        """SIGTERM, SIGKILL after `grace` seconds, and wait until nothing of it is left. Fine when it has ended."""
        ...

    def ended(self) -> tuple[int, str]:
        """(exit code, 128+n for signal n; who ended it, where neither the stage nor this driver did, else "")."""
        ...

    def shortage(self, limit: float | None) -> str:
        """Why it must be stopped for lack of memory: less than `limit` GiB are available; "" while there is enough."""
        ...

    def blamed(self, log: Path) -> Blamed:
        """What the exit code is of; `log` where one machine does it all."""
        ...


@dataclass(frozen=True)
class Blamed:
    """Of a stage that has failed: the launcher's log of the machine whose failure it was, the machine's name where
    there are several, the cause where no exit code tells it, and who ended it, as in `StageFailed`."""

    log: Path
    host: str = ""
    cause: str = ""
    ended_by: str = ""


class Runner(Protocol):
    """How the stages of a run are started. Made as `Runner(run, inherited, plan)`: the run folder, the environment as
    the driver found it, and plan.json."""

    native: Tree  # its part of the handle

    def close(self) -> None:
        """The run is over."""
        ...

    def launched(
        self, stage: RenderedStage, attempt: int, job: str, log: Path, unwanted: Callable[[], bool]
    ) -> AbstractContextManager[Started]:
        """Start `stage`; its output goes to `log`, in the order in which it is written. StageFailed: it can't start.

        unwanted   whether the run is to stop: what takes long before the start is given up then, as StageFailed
        """
        ...


@dataclass
class Driver:
    """One pass over a run's stages."""

    run: RunDir
    plan: Tree
    runner: Runner
    stopping: bool = False

    def drive(self, stages: list[RenderedStage]) -> int:
        """Run what has not succeeded yet; the exit code."""
        for stage in stages:
            folder = StageDir(Path(stage.cwd))
            if is_done(read_json(folder.record), self._stage_plan(stage.name)["fingerprint"]):
                append_event(self.run.events, "stage-skipped", stage=stage.name, reason="already succeeded")
                continue
            if self.stopping:
                return self._cancelled(None, None)
            attempt = folder.last_attempt() + 1
            restarts = 0
            try:
                while cause := self._run_stage(stage, folder, attempt):
                    restarts += 1
                    self._restart(stage.name, folder, attempt, cause, restarts)
                    attempt += 1
            except Stopped:
                return self._cancelled(stage.name, attempt)
            except StageFailed as cause:
                if self.stopping:  # it had not started yet
                    return self._cancelled(stage.name, attempt)
                how = {"scheduler": cause.ended_by} if cause.ended_by else {}
                append_event(self.run.events, "finished", state="failed", stage=stage.name, cause=str(cause), **how)
                return 1
        append_event(self.run.events, "finished", state="succeeded")
        return 0

    def wait_for_run(self, folder: Path) -> None:
        """Until that run is over: its driver has gone, and has left no process behind."""
        append_event(self.run.events, "waiting", run=folder.name)
        while not self.stopping and not is_over(folder):
            time.sleep(_POLL_SECONDS)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: only notes it; the loop that waits for the stage acts on it."""
        self.stopping = True

    def _run_stage(self, stage: RenderedStage, folder: StageDir, attempt: int) -> str:
        """ "" when it succeeded; why it is to be started again when it was ended from outside."""
        self._check_what_runs(stage)
        log = folder.launcher_log(attempt)
        log.parent.mkdir(parents=True)  # takes the number: a driver that dies from here on has used it up
        begun = time.monotonic()
        job = f"{self.plan['id']}-{attempt}"
        with self.runner.launched(stage, attempt, job, log, lambda: self.stopping) as started:
            try:
                append_event(self.run.events, "stage-started", stage=stage.name, attempt=attempt, **started.told)
                started.make_known()
                short = self._wait(started, self._options(stage.name))
            finally:  # also when this very code fails: nobody would be left who could stop it
                started.stop(self._options(stage.name).get("grace_seconds", DEFAULT_GRACE_SECONDS))
        code, interrupted = started.ended()
        told: Tree = {"exit_code": code, "seconds": round(time.monotonic() - begun, 3)}
        blamed = started.blamed(log) if code else Blamed(log)
        failure = torchrun.first_failure(blamed.log) if code else None
        if failure:
            told |= {"rank": failure.rank, "rank_exit_code": failure.exit_code}
        if blamed.host:
            told["host"] = blamed.host
        append_event(self.run.events, "stage-exited", stage=stage.name, attempt=attempt, **told)
        if self.stopping:
            raise Stopped
        fingerprint = self._stage_plan(stage.name)["fingerprint"]
        cause = failure_cause(folder, fingerprint, attempt, code, failure, blamed.log)
        cause = blamed.cause or cause
        if cause and blamed.host:
            cause = f"{blamed.host}: {cause}"
        if short and cause:  # else it was done before it could be stopped
            raise StageFailed(memory.ended_for(short, folder), memory.STOPPED_BY)
        if cause and not interrupted:
            raise StageFailed(cause, blamed.ended_by)
        return interrupted if cause else ""

    def _check_what_runs(self, stage: RenderedStage) -> None:
        """It is what was shown: StageFailed when a file, or the code, is not as planned any more."""
        for name, text in stage.files.items():
            path = Path(name)
            if not path.is_file() or path.read_bytes() != text.encode():
                raise StageFailed(f"{path} was changed after it had been planned")
        if other := sources.changed(self.run.path, self.plan["code"]["digest"]):
            raise StageFailed(f"the code in {other} was changed after it had been planned")

    def _wait(self, started: Started, options: Tree) -> str:
        """Until it has ended or must; why for lack of memory, "" otherwise. Then it has been asked to save and end."""
        limit: float | None = options.get("memory_stop_gib")
        grace = options.get("grace_seconds", DEFAULT_GRACE_SECONDS)
        seconds = _POLL_SECONDS if limit is None else _MEMORY_POLL_SECONDS
        while not self.stopping and not started.wait(seconds):
            short = started.shortage(limit)
            if short and limit is not None:
                started.ask()
                deadline = time.monotonic() + grace
                while time.monotonic() < deadline and not started.wait(seconds):
                    if started.shortage(limit / 2):  # saving takes more than is left
                        break
                started.stop(0.0)
                return short
        return ""

    def _restart(self, name: str, folder: StageDir, attempt: int, cause: str, restarts: int) -> None:
        """Note it; StageFailed when there were enough of them."""
        allowed = self._options(name).get("max_restarts", 0)
        if restarts > allowed:
            raise StageFailed(f"{cause}; it was started again {restarts - 1} times, and max_restarts is {allowed}")
        newest = latest_checkpoint(folder.checkpoints)
        step = int(newest.name.rpartition("_")[2]) if newest else None
        fields = {"stage": name, "attempt": attempt, "cause": cause, "step": step, "requeues": restarts}
        append_event(self.run.events, "requeued", **fields)

    def _cancelled(self, stage: str | None, attempt: int | None) -> int:
        append_event(self.run.events, "cancelled", stage=stage, attempt=attempt)
        return 130

    def _options(self, name: str) -> Tree:
        return dict(self._stage_plan(name)["placement"]["options"])

    def _stage_plan(self, name: str) -> Tree:
        return next(stage for stage in self.plan["stages"] if stage["name"] == name)


def main(argv: list[str] | None = None) -> int:
    """Carry out the run in the folder that is the only argument."""
    (folder,) = argv if argv is not None else sys.argv[1:]
    run = RunDir(Path(folder))
    inherited = dict(os.environ)
    plan, rendered = read_json(run.plan), read_json(run.rendered)
    if plan is None or rendered is None:
        raise FileNotFoundError(f"no plan.json and rendered.json in {folder}")
    with open(run.path / "driver.lock", "ab") as lock:  # the kernel lets go of it however this process ends
        if not _is_alone(lock.fileno(), plan["id"]):
            return BUSY
        return _drive(run, plan, rendered, inherited)


def _drive(run: RunDir, plan: Tree, rendered: Tree, inherited: dict[str, str]) -> int:
    executor = plan["stages"][0]["placement"]["executor"]
    module, _, name = RUNNERS[executor].partition(":")
    runner: Runner = getattr(import_module(module), name)(run, inherited, plan)
    driver = Driver(run, plan, runner)
    signal.signal(signal.SIGTERM, driver.request_stop)
    signal.signal(signal.SIGINT, driver.request_stop)
    # The handle is durable before anybody hears of the start: no moment exists in which a live driver can't be found.
    native = {**process_tree.identity(os.getpid()), **runner.native}
    write_sealed(run.handle, asdict(JobHandle(executor, plan["id"], str(run.path), native)))
    append_event(run.events, "driver-started", pid=os.getpid())
    try:
        if plan.get("after"):
            driver.wait_for_run(Path(plan["after"]))
        return driver.drive([_stage(data) for data in rendered["stages"]])
    except BaseException as error:
        append_event(run.events, "finished", state="failed", stage=None, cause=f"{type(error).__name__}: {error}")
        raise
    finally:
        runner.close()
        close(run)


def is_over(folder: Path) -> bool:
    """Whether nobody runs that run: each driver holds its lock while it lives."""
    try:
        with open(folder / "driver.lock", "ab") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    plan = read_json(RunDir(folder).plan)
    return plan is None or not process_tree.members(plan["id"])


def _is_alone(descriptor: int, run_id: str) -> bool:
    """Whether no other driver, and no orphan of one that was killed, works on this run."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another driver runs this run", file=sys.stderr)
        return False
    others = process_tree.members(run_id)
    if process_tree.wait(others, _LEAVING_SECONDS):  # a driver that came too late for the lock is about to leave
        return True
    print(f"processes of an earlier driver still run: {[p.pid for p in others]}", file=sys.stderr)
    return False


def _stage(data: dict[str, Any]) -> RenderedStage:
    elsewhere = {host: tuple(argv) for host, argv in data.get("elsewhere", {}).items()}
    argv = tuple(data["argv"])
    return RenderedStage(data["name"], data["files"], argv, data["env"], data["cwd"], elsewhere=elsewhere)


if __name__ == "__main__":
    # As the module of that name: a runner imports it too, and must raise the same StageFailed.
    from nemotron_recipes.executors import driver

    exit_code = driver.main()
    # Taking the interpreter down with NeMo-Run in it takes up to half a second, for which a follower would wait.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
