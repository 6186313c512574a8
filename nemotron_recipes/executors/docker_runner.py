"""Stages as containers of this machine's docker daemon: the `Runner` of executor `docker`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from nemotron_recipes.executors import docker_files, process_tree
from nemotron_recipes.executors.docker_control import Docker, Refused, Unreachable, endpoint
from nemotron_recipes.executors.driver import StageFailed
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import ATTEMPT_ENV, RUN_ID_ENV, RunDir, StageDir
from nemotron_recipes.spec import RenderedStage, Tree

_RETRY_SECONDS = 1.0
_START_SECONDS = 120.0  # for a daemon that is being restarted between two stages
# A daemon that shuts down asks its containers to stop first, and goes some seconds later (`--shutdown-timeout`: 15 s).
_LEAVING_SECONDS = 20.0


class DockerRunner:
    """See `driver.Runner`."""

    def __init__(self, run: RunDir, inherited: dict[str, str], plan: Tree):
        placement = plan["stages"][0]["placement"]
        self.run, self.inherited = run, inherited
        self.secrets = {name: inherited[name] for stage in plan["stages"] for name in stage["placement"]["secrets"]}
        self.docker = Docker(endpoint(placement["options"]["docker_host"], inherited))
        self.native: Tree = {"docker_host": self.docker.host}

    def load(self) -> None:
        pass

    def close(self) -> None:
        docker_files.secrets(self.run).unlink(missing_ok=True)

    @contextmanager
    def launched(self, stage: RenderedStage, attempt: int, job: str, log: Path) -> Iterator[StageContainer]:
        if self.secrets:
            write_atomic(docker_files.secrets(self.run), json.dumps(self.secrets), mode=0o600)
        name = stage.argv[stage.argv.index("--name") + 1]
        container = StageContainer(self.docker, self._start(stage, attempt, name), stage, attempt)
        try:
            yield container
        finally:
            container.close(log)
            docker_files.secrets(self.run).unlink(missing_ok=True)

    def _start(self, stage: RenderedStage, attempt: int, name: str) -> str:
        """The id of the container that `stage.argv` starts. StageFailed: docker's words, or it is running already."""
        if not _answers(self.docker, _START_SECONDS):
            raise StageFailed(f"the docker daemon at {self.docker.host} does not answer")
        try:
            earlier = self.docker.container(name)
            if earlier is not None and earlier.running:
                raise StageFailed(f"container {name} of an earlier driver still runs: nemotron runs cancel")
            self.docker.remove(name)
            environ: Mapping[str, str] = {**self.inherited, ATTEMPT_ENV: str(attempt)}
            return self.docker.ask(*stage.argv[1:], environ=environ).split()[-1]
        except (Refused, Unreachable) as error:
            with suppress(Refused, Unreachable):
                self.docker.remove(name)  # created, but not started
            raise StageFailed(f"docker can't start it: {error}{_advice(str(error))}") from None


class StageContainer:
    """See `driver.Started`."""

    def __init__(self, docker: Docker, container: str, stage: RenderedStage, attempt: int):
        self.docker, self.id = docker, container
        self.run_id, self.stage, self.attempt = stage.env[RUN_ID_ENV], StageDir(Path(stage.cwd)), attempt
        self.told: Tree = {"container": container}
        self._waiting: subprocess.Popen[bytes] | None = None
        self._watching: subprocess.Popen[bytes] | None = None  # ends with the daemon, and not before
        self._code: int | None = None  # once it has ended
        self._asked = False
        self._cut_off = False  # the daemon is away, or was when it ended

    def wait(self, seconds: float) -> bool:
        if self._code is not None:
            return True
        if self._waiting is None:
            if self._watching is None or self._watching.poll() is not None:
                self._watching = self.docker.start(
                    "events", "--filter", "event=die", "--filter", f"container={self.id}"
                )
            self._waiting = self.docker.start("wait", self.id)
        try:
            told = self._waiting.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._waiting = None
        if told:
            time.sleep(min(seconds, _RETRY_SECONDS))
        try:
            found = self.docker.container(self.id)
        except (Refused, Unreachable) as error:  # a daemon that begins or ends may refuse what it will answer later
            if not self._cut_off:
                print(f"the docker daemon is away, waiting for it: {error}", file=sys.stderr)
            self._cut_off = True
            return False
        if found is None:
            print(f"container {self.id} was removed by somebody", file=sys.stderr)
        else:
            self._cut_off = self._cut_off or told != 0  # the daemon was away for less than a look at it takes
            if found.running:  # it has outlived that
                self._cut_off = False
                return False
        self._code = self._ended_with(found.exit_code if found else None)
        return True

    def ask(self) -> None:
        self._asked = True
        with suppress(Refused, Unreachable):  # it has just ended, or `stop` sees to it
            self.docker.ask("kill", "--signal", "TERM", self.id)

    def stop(self, grace: float) -> None:
        if self.wait(0.0):
            return
        self._asked = True
        try:
            self.docker.stop(self.id, grace)
        except (Refused, Unreachable) as error:
            print(f"docker can't stop it, so its processes are: {error}", file=sys.stderr)
            if process_tree.stop(self.run_id, grace):
                print("some did not end", file=sys.stderr)
            self._code = self._ended_with(None)
            return
        while not self.wait(_RETRY_SECONDS):
            pass

    def ended(self) -> tuple[int, str]:
        assert self._code is not None
        if not self._code or self._asked:
            return self._code, ""
        report = docker_files.read_report(self.stage, self.attempt)
        # Killed without a word while the daemon was away, or asked to stop by a daemon that was about to go.
        if (report is None and self._cut_off) or (report is not None and report.stopped and self._daemon_went()):
            return self._code, "docker-daemon"
        return self._code, ""

    def close(self, log: Path) -> None:
        """Keep what the container said before its launcher wrote anything, and remove it."""
        for child in (self._waiting, self._watching):
            if child is not None:
                child.kill()
                child.communicate()
        try:
            if not log.exists() or not log.stat().st_size:
                argv = ("docker", "logs", "--tail", "200", self.id)
                with open(log, "ab") as output:
                    environ = self.docker.environment(os.environ)
                    subprocess.run(argv, env=environ, stdout=output, stderr=output, timeout=60, check=False)
            self.docker.remove(self.id)
        except (Refused, Unreachable, subprocess.TimeoutExpired) as error:
            print(f"container {self.id} is left over: {error}", file=sys.stderr)

    def _ended_with(self, told: int | None) -> int:
        """The container's exit code; of one that a restarted daemon has to guess at, what its first process said."""
        report = docker_files.read_report(self.stage, self.attempt)
        if told is None or self._cut_off:
            return report.exit_code if report else docker_files.KILLED
        return told

    def _daemon_went(self) -> bool:
        """Whether the daemon was restarted; returns when it is back. False: somebody else stopped the container."""
        if not self._cut_off and self._watching is not None:
            try:
                self._watching.wait(_LEAVING_SECONDS)  # a look now and then would miss a quick restart
            except subprocess.TimeoutExpired:
                return False
        print("the docker daemon is away, waiting for it", file=sys.stderr)
        return _answers(self.docker, float("inf"))


def _answers(docker: Docker, seconds: float) -> bool:
    """Whether the daemon answers, now or within that time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            docker.ask("version", "--format", "{{.Server.Version}}")
            return True
        except Unreachable:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_RETRY_SECONDS)


def _advice(words: str) -> str:
    if "could not select device driver" in words or "nvidia" in words.lower():
        return '\n    fix:  install the NVIDIA container toolkit and restart docker, or set gpus = "none"'
    if "rlimit" in words:
        return "\n    fix:  this host allows no such limit: set ulimits in the profile"
    return ""
