"""The process that carries out a submitted local run: python -m nemotron_recipes.executors.local_driver RUN_DIR

It outlives the terminal, reads plan.json and rendered.json, runs the stages in order, and writes events.jsonl:

    driver-started  pid
    stage-skipped   stage, reason
    stage-started   stage, attempt, pid
    stage-exited    stage, attempt, exit_code (128+n for signal n), seconds; under torchrun, which always ends with 1,
                    also rank and rank_exit_code of the worker that failed first
    cancelled       stage, attempt (null when no stage ran)          | the last event of a driver
    finished        state ("succeeded"), or "failed" with stage, cause | is one of these two

Exit codes: 0 done, 1 a stage failed, 130 cancelled, 3 somebody else runs this run.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from nemotron_recipes.executors import DEFAULT_GRACE_SECONDS, nemo_adapter, process_tree, torchrun
from nemotron_recipes.executors.verdict import failure_cause, is_done
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import ATTEMPT_ENV, RunDir, StageDir, append_event, read_json
from nemotron_recipes.spec import JobHandle, RenderedStage, Tree, to_json

BUSY = 3

_LEAVING_SECONDS = 3.0


class Stopped(Exception):
    """A signal asked the driver to stop."""


class StageFailed(Exception):
    """The stage did not succeed; the text is the cause."""


@dataclass
class Driver:
    """One pass over a run's stages."""

    run: RunDir
    plan: Tree
    inherited: dict[str, str]  # the environment as the driver found it
    stopping: bool = False

    def drive(self, stages: list[RenderedStage]) -> int:
        """Run what has not succeeded yet; the exit code."""
        loaded = False
        for stage in stages:
            folder = StageDir(Path(stage.cwd))
            if is_done(read_json(folder.record), self._stage_plan(stage.name)["fingerprint"]):
                append_event(self.run.events, "stage-skipped", stage=stage.name, reason="already succeeded")
                continue
            if not loaded:
                nemo_adapter.load(self.run.path / "nemo_run")
                loaded = True
            if self.stopping:
                return self._cancelled(None, None)
            attempt = folder.last_attempt() + 1
            try:
                self._run_stage(stage, folder, attempt)
            except Stopped:
                return self._cancelled(stage.name, attempt)
            except StageFailed as cause:
                append_event(self.run.events, "finished", state="failed", stage=stage.name, cause=str(cause))
                return 1
        append_event(self.run.events, "finished", state="succeeded")
        return 0

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: only notes it; the loop that waits for the stage acts on it."""
        self.stopping = True

    def _run_stage(self, stage: RenderedStage, folder: StageDir, attempt: int) -> None:
        _check_files(stage)
        log = folder.launcher_log(attempt)
        log.parent.mkdir(parents=True)  # takes the number: a driver that dies from here on has used it up
        begun = time.monotonic()
        environ = {**self.inherited, ATTEMPT_ENV: str(attempt)}
        with nemo_adapter.launched(stage, environ, log, job=f"{self.plan['id']}-{attempt}") as process:
            try:
                append_event(self.run.events, "stage-started", stage=stage.name, attempt=attempt, pid=process.pid)
                self._wait(process)
            finally:  # also when this very code fails: NeMo-Run would wait for the process for ever
                if process.poll() is None:
                    self._stop_stage(stage.name, process)
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        told: Tree = {"exit_code": code, "seconds": round(time.monotonic() - begun, 3)}
        failure = torchrun.first_failure(log) if code else None
        if failure:
            told |= {"rank": failure.rank, "rank_exit_code": failure.exit_code}
        append_event(self.run.events, "stage-exited", stage=stage.name, attempt=attempt, **told)
        if self.stopping:
            raise Stopped
        cause = failure_cause(folder, self._stage_plan(stage.name)["fingerprint"], attempt, code, failure, log)
        if cause:
            raise StageFailed(cause)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until the process ends or a stop is asked for."""
        while not self.stopping:
            try:
                process.wait(timeout=0.5)
                return
            except subprocess.TimeoutExpired:
                continue

    def _stop_stage(self, name: str, process: subprocess.Popen[bytes]) -> None:
        grace = self._stage_plan(name)["placement"]["options"].get("grace_seconds", DEFAULT_GRACE_SECONDS)
        survivors = process_tree.stop(self.plan["id"], grace, [psutil.Process(process.pid)])
        if survivors:
            print(f"processes that SIGKILL did not end: {survivors}", file=sys.stderr)
        process.wait()

    def _cancelled(self, stage: str | None, attempt: int | None) -> int:
        append_event(self.run.events, "cancelled", stage=stage, attempt=attempt)
        return 130

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
    driver = Driver(run, plan, inherited)
    signal.signal(signal.SIGTERM, driver.request_stop)
    signal.signal(signal.SIGINT, driver.request_stop)
    # The handle is durable before anybody hears of the start: no moment exists in which a live driver can't be found.
    write_atomic(run.handle, to_json(JobHandle("local", plan["id"], str(run.path), process_tree.identity(os.getpid()))))
    append_event(run.events, "driver-started", pid=os.getpid())
    try:
        return driver.drive([_stage(data) for data in rendered["stages"]])
    except BaseException as error:
        append_event(run.events, "finished", state="failed", stage=None, cause=f"{type(error).__name__}: {error}")
        raise


def _check_files(stage: RenderedStage) -> None:
    """What runs is what was shown: StageFailed when a file is not as rendered any more."""
    for name, text in stage.files.items():
        path = Path(name)
        if not path.is_file() or path.read_bytes() != text.encode():
            raise StageFailed(f"{path} was changed after it had been planned")


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
    return RenderedStage(data["name"], data["files"], tuple(data["argv"]), data["env"], data["cwd"])


if __name__ == "__main__":
    sys.exit(main())
