"""One stage as a container on each of several hosts: started together, watched together, ended together."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from nemotron_recipes.errors import NemotronError
from nemotron_recipes.executors import memory, torchrun
from nemotron_recipes.executors.docker import files
from nemotron_recipes.executors.docker.container import StageContainer, start
from nemotron_recipes.executors.docker.places import LEFT, daemon_at
from nemotron_recipes.executors.driver import Blamed, StageFailed
from nemotron_recipes.executors.hosts import copies, network
from nemotron_recipes.executors.hosts.network import Host, NoLink
from nemotron_recipes.executors.hosts.watch import Watch
from nemotron_recipes.executors.remote import there
from nemotron_recipes.executors.slurm import meeting
from nemotron_recipes.executors.verdict import what_is_kept
from nemotron_recipes.rundir import RunDir, StageDir, append_event
from nemotron_recipes.spec import RenderedStage, Tree

CUT_BY, AWAY_BY = "NETWORK", "HOST"  # in the event that ends the run

_ECHO_SECONDS = 5.0  # within which ranks on other hosts fall over a failed one by themselves, and say so
_MEMORY_SECONDS = 0.1
_LOOK_SECONDS = 1.0
_STALE_SECONDS = 5.0  # an older figure says nothing


@dataclass(frozen=True)
class Given:
    """What the run's driver knows of it: plan.json, the options of its placement, and the secrets' values by name."""

    run: RunDir
    plan: Tree
    options: Tree
    secrets: dict[str, str] = field(repr=False)


@dataclass
class Part:
    """One host's part of the stage."""

    host: Host
    container: StageContainer
    back: copies.Back
    seen: float = 0.0  # when its host last answered, by time.monotonic
    order: int = 0  # which end was seen first; 0: none yet


@contextmanager
def launched(
    given: Given, stage: RenderedStage, attempt: int, log: Path, unwanted: Callable[[], bool]
) -> Iterator[Together]:
    """See `driver.Runner.launched`. The network between the hosts is looked for anew: much may have changed since."""
    machines = network.of_options(given.options)
    with ExitStack() as stack:
        try:
            found = network.find_links(machines, given.options["hosts_interface"])
            slow = network.too_slow(machines, found, given.options["hosts_min_gbps"])
            if slow:
                raise StageFailed(slow)
            held, port = meeting.hold_port(StageDir(Path(stage.cwd)), attempt, given.plan["created"])
            stack.enter_context(held)
            environments = network.environments(found, port)
            told = [link.words(machines[0].name, host.name) for host, link in zip(machines[1:], found, strict=True)]
            append_event(given.run.events, "linked", stage=stage.name, links=told, environment=environments[0])
            watch = Watch(machines, found, partial(_tell, given, stage.name))
            stack.callback(watch.close)
            for host in machines[1:]:
                stack.callback(_clear, host, given.run)
                _bring(given, host, stage, unwanted)
            parts = _started(given, stage, attempt, machines, environments)
        except (NoLink, meeting.NoMeeting, NemotronError, OSError) as error:
            raise StageFailed(str(error)) from None
        together = Together(parts, stage, attempt, given.options, given.run, watch.down)
        try:
            yield together
        finally:
            together.close(log)


class Together:
    """See `driver.Started`."""

    def __init__(
        self,
        parts: list[Part],
        stage: RenderedStage,
        attempt: int,
        options: Tree,
        run: RunDir,
        down: Callable[[], tuple[float, str]] = lambda: (0.0, ""),
    ):
        """down: for how long the network between the hosts has been gone, and why (`Watch.down`)"""
        self.run, self._down = run, down
        self.parts, self.stage, self.attempt = parts, StageDir(Path(stage.cwd)), attempt
        self.lost_after: float = options["hosts_lost_seconds"]
        self.grace: float = options["grace_seconds"]
        ids = {part.host.name: part.container.id for part in parts}
        self.told: Tree = {"container": parts[0].container.id, "containers": ids, "hosts": [*ids]}
        self._cut = ""  # why the network between the hosts ended it
        self._ends = 0
        self._asked_at: float | None = None  # when the others were asked to stop, for one that has failed
        self._failed_at: float | None = None
        self._memory: dict[str, tuple[float, memory.Memory | None]] = {}
        self._over = threading.Event()
        self._changed = threading.Event()  # another host's part has ended
        for part in parts:
            part.seen = time.monotonic()
            if part.host.node:
                part.back.start()
                threading.Thread(target=self._look_at, args=(part,), daemon=True).start()
        if options["memory_stop_gib"] is not None:
            for part in parts[1:]:
                threading.Thread(target=self._watch_memory, args=(part.host,), daemon=True).start()

    def make_known(self) -> None:
        pass

    def wait(self, seconds: float) -> bool:
        first, *others = self.parts
        if first.container.wait(seconds):
            self._note(first)
            if not self._all_over():
                self._changed.wait(seconds)
                self._changed.clear()
        for part in others:
            if part.container.code is not None:
                self._note(part)
            elif part.container.away and time.monotonic() - part.seen > self.lost_after:
                part.container.give_up(part.container.away)
                self._note(part)
        failed = any(part.container.code for part in self.parts)
        if not self._cut and self._failed_at is None:
            self._cut = self._cut_off(failed)
        if (failed or self._cut) and not self._all_over():
            self._end_the_others()
        return self._all_over()

    def ask(self) -> None:
        self._side_by_side(lambda part: part.container.ask())

    def stop(self, grace: float) -> None:
        self._side_by_side(lambda part: part.container.stop(grace))
        for part in self.parts:
            self._note(part)

    def ended(self) -> tuple[int, str]:
        first = self._first()
        return first.container.ended() if first else (0, "")

    def shortage(self, limit: float | None) -> str:
        short = memory.shortage(limit, memory.read_memory())
        if short:
            return f"{self.parts[0].host.name}: {short}"
        for name, (when, figure) in [*self._memory.items()]:
            short = memory.shortage(limit, figure) if time.monotonic() - when < _STALE_SECONDS else ""
            if short:
                return f"{name}: {short}"
        return ""

    def blamed(self, log: Path) -> Blamed:
        first = self._first()
        if first is None:
            return Blamed(log)
        if first.container.away:
            words = f"can't be reached any more ({first.container.away}); its container may still run there, and"
            return Blamed(
                log, first.host.name, f"{words} `nemotron runs cancel` stops it when the host is back", AWAY_BY
            )
        if self._cut:
            return Blamed(log, cause=f"{self._cut}; {what_is_kept(self.stage)}", ended_by=CUT_BY)
        own = self.stage.launcher_log(self.attempt, first.host.node)
        return replace(first.container.blamed(own), host=first.host.name)

    def close(self, log: Path) -> None:
        """All has ended: bring back what is left, and leave nothing on the other hosts."""
        self._over.set()
        for part in self.parts:
            if part.container.away:
                append_event(self.run.events, LEFT, host=part.host.name, container=part.container.id)
            if part.host.node:
                part.back.stop()
                with suppress(NemotronError, OSError):
                    part.back.refresh()
            part.container.close(log if part.host.node == 0 else self.stage.launcher_log(self.attempt, part.host.node))

    def _cut_off(self, failed: bool) -> str:
        """Why the network between the hosts has ended it: gone for too long, or when a rank failed; "" otherwise."""
        seconds, why = self._down()
        if why and failed:
            return f"a rank failed while the network between the hosts was gone ({why})"
        if why and seconds > self.lost_after:
            return f"the network between the hosts was gone for {seconds:.0f} s ({why})"
        return ""

    def _all_over(self) -> bool:
        return all(part.container.code is not None for part in self.parts)

    def _note(self, part: Part) -> None:
        if part.order == 0:
            self._ends += 1
            part.order = self._ends

    def _look_at(self, part: Part) -> None:
        """On another host, which may take long to answer: the first one must not be left alone meanwhile."""
        while not self._over.is_set():
            if part.container.wait(_LOOK_SECONDS):
                self._changed.set()
                return
            if not part.container.away:
                part.seen = time.monotonic()

    def _end_the_others(self) -> None:
        """One has failed: the others fall over it, are asked, and are ended, in this order."""
        now = time.monotonic()
        if self._failed_at is None:
            self._failed_at = now
        elif self._asked_at is None:
            if now - self._failed_at > _ECHO_SECONDS:
                self._asked_at = now
                self.ask()
        elif now - self._asked_at > self.grace:
            self.stop(0.0)

    def _side_by_side(self, what: Callable[[Part], None]) -> None:
        threads = [threading.Thread(target=what, args=(part,)) for part in self.parts if part.container.code is None]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _first(self) -> Part | None:
        """The part that failed first; the others fell over it. None where none has failed.

        Hosts' clocks differ. A host that is gone comes first, then a rank that was killed, which leaves no word; those
        that say what they fell over, in the order in which their ends were seen.
        """
        failed = [part for part in self.parts if part.container.code]
        unasked = [part for part in failed if not part.container.asked or part.container.away]
        return min(unasked or failed, key=self._place, default=None)

    def _place(self, part: Part) -> tuple[int, int]:
        failure = torchrun.first_failure(self.stage.launcher_log(self.attempt, part.host.node))
        code = failure.exit_code if failure else part.container.code or 0
        if part.container.away:
            return (0, part.order)
        said = failure is not None and self.stage.failure(self.attempt, failure.rank).exists()
        return (1 if code > 128 and not said else 2, part.order)

    def _watch_memory(self, host: Host) -> None:
        while not self._over.wait(_MEMORY_SECONDS):
            with suppress(NemotronError, OSError):
                told = host.where.call(memory.read_memory)
                self._memory[host.name] = (time.monotonic(), memory.Memory(*told) if told else None)


def _bring(given: Given, host: Host, stage: RenderedStage, unwanted: Callable[[], bool]) -> None:
    """Copies and folders that the container there mounts."""
    folders = [given.plan["run_dir"], given.plan["store"], stage.cwd]
    if host.root:
        copies.send(host, copies.needed(given.run, given.plan, stage.name), unwanted)
        for folder in folders:
            host.where.call(there.make_folder, host.place(folder))
        if given.secrets:
            file = host.place(str(files.secrets(given.run)))
            host.where.call(there.write, file, json.dumps(given.secrets), 0o600)
    host.where.call(there.make_folder, stage.env["HF_HOME"])


def _clear(host: Host, run: RunDir) -> None:
    """The copy of the run's folder there, with its secrets."""
    try:
        copies.clear(host, run)
    except (NemotronError, OSError) as error:
        print(f"{host.name}: the copy of the run's folder is left there: {error}", file=sys.stderr)


def _started(
    given: Given,
    stage: RenderedStage,
    attempt: int,
    machines: list[Host],
    environments: list[dict[str, str]],
) -> list[Part]:
    """All, or none: StageFailed names the host that could not."""
    parts: list[Part] = []
    for host, environment in zip(machines, environments, strict=True):
        argv = stage.elsewhere.get(host.name, stage.argv)
        back = copies.Back(host, given.run)
        try:
            docker = daemon_at(host, given.options["docker_host"])
            container = start(docker, argv, attempt, environment)
        except (StageFailed, NemotronError) as error:
            for part in parts:
                part.container.stop(0.0)
                part.container.close(StageDir(Path(stage.cwd)).launcher_log(attempt, part.host.node))
            raise StageFailed(f"{host.name}: {error}") from None
        refresh = back.refresh if host.node else _nothing
        parts.append(Part(host, StageContainer(docker, container, stage, attempt, host.node, refresh), back))
    return parts


def _tell(given: Given, stage: str, event: str, words: str) -> None:
    append_event(given.run.events, event, stage=stage, words=words)


def _nothing() -> None:
    pass
