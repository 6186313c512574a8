"""One stage's container: started, watched through whatever becomes of its daemon, and its end found out."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from nemotron_recipes.errors import NemotronError
from nemotron_recipes.executors import memory
from nemotron_recipes.executors.docker import files
from nemotron_recipes.executors.docker.control import Docker, HostAway, Refused, Unreachable, advice
from nemotron_recipes.executors.driver import Blamed, StageFailed
from nemotron_recipes.executors.local import process_tree
from nemotron_recipes.executors.verdict import named
from nemotron_recipes.rundir import ATTEMPT_ENV, RUN_ID_ENV, StageDir
from nemotron_recipes.spec import RenderedStage, Tree

OUT_OF_MEMORY = "OUT_OF_MEMORY"  # in the event that ends the run

_RETRY_SECONDS = 1.0
_START_SECONDS = 120.0  # for a daemon that is being restarted between two stages
# A daemon that shuts down asks its containers to stop first, and goes some seconds later (`--shutdown-timeout`: 15 s).
_LEAVING_SECONDS = 20.0


def start(docker: Docker, argv: Sequence[str], attempt: int, more: Mapping[str, str]) -> str:
    """The id of the container that `argv` starts, with `more` in the environment of docker's command. StageFailed:
    docker's words, or it is running already."""
    name = argv[argv.index("--name") + 1]
    if not _answers(docker, _START_SECONDS):
        raise StageFailed(f"the docker daemon at {docker.host} does not answer")
    try:
        earlier = docker.container(name)
        if earlier is not None and earlier.running:
            raise StageFailed(f"container {name} of an earlier driver still runs: nemotron runs cancel")
        docker.remove(name)
        return docker.ask(*argv[1:], more={**more, ATTEMPT_ENV: str(attempt)}).split()[-1]
    except (Refused, Unreachable) as error:
        with suppress(Refused, Unreachable):
            docker.remove(name)  # created, but not started
        fix = advice(str(error))
        raise StageFailed(f"docker can't start it: {error}" + (f"\n    fix:  {fix}" if fix else "")) from None


class StageContainer:
    """See `driver.Started`."""

    def __init__(
        self,
        docker: Docker,
        container: str,
        stage: RenderedStage,
        attempt: int,
        node: int = 0,
        refresh: Callable[[], None] = lambda: None,
    ):
        """refresh: brings here what the container's first process has written, where that is on another host."""
        self.docker, self.id, self.node, self.refresh = docker, container, node, refresh
        self.run_id, self.stage, self.attempt = stage.env[RUN_ID_ENV], StageDir(Path(stage.cwd)), attempt
        self.told: Tree = {"container": container}
        self._waiting: subprocess.Popen[bytes] | None = None
        self._watching: subprocess.Popen[bytes] | None = None  # ends with the daemon, and not before
        self._code: int | None = None  # once it has ended
        self._asked = False
        self._cut_off = False  # the daemon is away, or was when it ended
        self._out_of_memory = False  # docker's word: the kernel has killed one of its processes for that
        self.away = ""  # why its host can't be reached now
        self._lock = threading.Lock()  # one looks at it while another one stops it

    def make_known(self) -> None:
        pass

    def wait(self, seconds: float) -> bool:
        with self._lock:
            return self._code is not None or self._look(seconds)

    def _look(self, seconds: float) -> bool:
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
            self.away = ""
        except HostAway as error:
            self.away = str(error)
            return False
        except (Refused, Unreachable) as error:  # a daemon that begins or ends may refuse what it will answer later
            self.away = ""
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
            self._out_of_memory = found.out_of_memory
        code = self._ended_with(found.exit_code if found else None)
        self._code = code if self._code is None else self._code
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
        except HostAway as error:
            self.give_up(str(error))
            return
        except (Refused, Unreachable) as error:
            print(f"docker can't stop it, so its processes are: {error}", file=sys.stderr)
            if process_tree.stop(self.run_id, grace):
                print("some did not end", file=sys.stderr)
            self._code = self._ended_with(None)
            return
        while not self.wait(_RETRY_SECONDS):
            if self.away:
                self.give_up(self.away)

    @property
    def code(self) -> int | None:
        """How it has ended; None before."""
        return self._code

    @property
    def asked(self) -> bool:
        """Whether it has been asked to stop."""
        return self._asked

    def give_up(self, why: str) -> None:
        """Its host is away: whatever becomes of it there, here it has ended."""
        self.away, self._code = why, files.KILLED

    def shortage(self, limit: float | None) -> str:
        return memory.shortage(limit, memory.read_memory())

    def blamed(self, log: Path) -> Blamed:
        if not self._out_of_memory or self._asked:
            return Blamed(log)
        words = "docker says OOMKilled: the memory limit of its container, or the machine's memory, was reached"
        return Blamed(log, cause=f"exit code {named(self._code or 0)}, {words}; see {log}", ended_by=OUT_OF_MEMORY)

    def ended(self) -> tuple[int, str]:
        assert self._code is not None
        if not self._code or self._asked:
            return self._code, ""
        report = files.read_report(self.stage, self.attempt, self.node)
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
                with open(log, "a") as output:
                    output.write(self.docker.logs(self.id))
            self.docker.remove(self.id)
        except (Refused, Unreachable) as error:
            print(f"container {self.id} is left over: {error}", file=sys.stderr)

    def _ended_with(self, told: int | None) -> int:
        """The container's exit code; of one that a restarted daemon has to guess at, what its first process said."""
        with suppress(NemotronError, OSError):
            self.refresh()
        report = files.read_report(self.stage, self.attempt, self.node)
        if told is None or self._cut_off:
            return report.exit_code if report else files.KILLED
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
