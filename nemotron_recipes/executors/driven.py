"""Executors whose runs are carried out on this machine by a driver (driver.py): what they have in common."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemotron_recipes.closing import end
from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.executors import DEFAULT_GRACE_SECONDS, Executor, Liveness, checks, memory
from nemotron_recipes.rundir import RUN_ID_ENV, RunDir, append_event, read_json, read_jsonl
from nemotron_recipes.spec import Examination, Finding, JobHandle, Outlook, Plan, Rendered, Tree, Wait

DRIVER = "nemotron_recipes.executors.driver"

_START_SECONDS = 60.0  # for a driver to report; it takes 0.3 s on an idle machine
_STOP_SLACK_SECONDS = 15.0  # beyond the grace, for SIGKILL and for NeMo-Run to close
_DRIVERS: list[subprocess.Popen[bytes]] = []  # started by this process; polled so that a dead one is no zombie


class DrivenProfile(BaseModel):
    """What the profiles of such executors have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    executor: str = ""
    nodes: Literal[1] = 1
    nproc_per_node: Annotated[int, Field(ge=1)] = 1  # processes that train together, one per GPU if there are any
    env: dict[str, str] = {}  # set for every stage; written to the run folder in plain text
    secrets: list[str] = []  # names of variables that must be set where the run is started; never shown
    gpu: str | None = None  # one of nemotron_recipes/sizing/gpus.toml: what a plan must fit into
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None  # the same for a GPU that is not there
    grace_seconds: Annotated[float, Field(ge=0)] = DEFAULT_GRACE_SECONDS  # between SIGTERM and SIGKILL
    stall_factor: Annotated[float, Field(gt=0)] | None = None  # for how many median steps nothing may move; unset: 20
    stall_seconds: Annotated[float, Field(gt=0)] | None = None  # at least so many seconds; unset: 120
    # For machines whose GPU uses the host's memory, and which hang when it is used up. Unset: not looked at.
    memory_reserve_gib: Annotated[float, Field(ge=0)] | None = None  # a stage that does not leave that much is refused
    memory_stop_gib: Annotated[float, Field(gt=0)] | None = None  # a run is stopped when less than that is available


class DrivenExecutor:
    """What an `Executor` does with a submitted run, by means of a driver."""

    detaches = False
    at_once: int | None = 1  # they would share this machine's memory
    ask_seconds = 0.1

    def __init__(self, together: bool = False):
        self._together = together  # many runs are asked about: this machine's processes are looked through once
        self._alive: set[str] | None = None

    def preflight(self, plan: Plan, beside: Sequence[Plan] = ()) -> list[Problem]:
        """What does not fit into this machine's memory, and what else it can't do of the plan."""
        return [*_misfits(plan), *self._unfit(plan)]

    def examine(self, profile: Tree) -> Examination:
        """This machine needs no profile's help."""
        said = f"{socket.gethostname()}, {os.cpu_count()} CPUs; nothing else has to be asked"
        return Examination((Finding("machine", "ok", said),))

    def look_into_nodes(self, profile: Tree, folder: str, patience: float) -> Examination:
        """There is no scheduler that could start a job."""
        raise UserError(Problem("there are no nodes behind this profile: it runs on this machine", "command line"))

    def submit(self, plan: Plan, rendered: Rendered) -> JobHandle:
        """Start the driver in a session of its own. The driver itself writes handle.json, then reports its start."""
        run = RunDir(Path(plan.run_dir))
        earlier = len(list(read_jsonl(run.events)))
        (command,) = rendered.submit
        with open(run.driver_log, "ab") as log:
            driver = subprocess.Popen(
                command,
                cwd=plan.run_dir,
                env={**os.environ, RUN_ID_ENV: plan.id, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _DRIVERS.append(driver)
        try:
            _wait_for_start(run, driver, earlier)
        except BaseException as reason:  # Ctrl-C, too: whoever doesn't get a handle leaves nothing running
            driver.terminate()
            driver.wait()
            if isinstance(reason, KeyboardInterrupt):  # the driver may have been too young to say so
                append_event(run.events, "cancelled", stage=None, attempt=None)
            raise
        handle = read_json(run.handle)
        assert handle is not None, "the driver writes it before it reports its start"
        return JobHandle(**handle)

    def together(self, handles: Sequence[JobHandle]) -> Executor:
        """One look through the processes of this machine, if any of these runs needs it."""
        return type(self)(together=True)  # type: ignore[return-value]

    def liveness(self, handle: JobHandle) -> Liveness:
        """What a killed driver left counts as running: a second start beside it would write to the same folder.

        Processes of another machine can't be seen: without a recorded end the run counts as running there.
        """
        from nemotron_recipes.executors.local import process_tree

        for driver in _DRIVERS:
            driver.poll()
        if process_tree.find(handle.native["pid"], handle.native["created"], handle.run):
            return (
                "queued"
                if _last_event(handle, "driver-started", "waiting", "stage-started") == "waiting"
                else "running"
            )
        if has_ended(handle):
            return "ended"
        if self._has_processes(handle.run) or not is_of_this_host(handle):
            return "running"
        return self._without_driver(handle)

    def _has_processes(self, run: str) -> bool:
        from nemotron_recipes.executors.local import process_tree

        if not self._together:
            return bool(process_tree.members(run))
        if self._alive is None:
            self._alive = process_tree.runs_alive()
        return run in self._alive

    def look(self, handle: JobHandle) -> Outlook:
        """There is no queue: nothing more than whether it runs."""
        return Outlook(self.liveness(handle))

    def waits(self, handle: JobHandle) -> list[Wait]:
        """None: nothing waits here."""
        return []

    def differences(self, handle: JobHandle) -> list[str]:
        """None: there is one source."""
        return []

    def shell(self, handle: JobHandle, stage: str, command: Sequence[str]) -> list[str]:
        """The command as it is: the run's place is this machine."""
        if not is_of_this_host(handle):
            host = handle.native["host"]
            raise UserError(Problem(f"run {handle.run} was started on {host}", fix=f"run this command on {host}"))
        return [*command]

    def settle(self, handle: JobHandle) -> list[Tree]:
        """None: the driver is the only one who could know."""
        return []

    def tidy(self, handle: JobHandle) -> list[str]:
        """Nothing: there is no queue."""
        return []

    def cancel(self, handle: JobHandle) -> None:
        """Ask the driver to stop, then stop whatever is left of the run; the latter also when no driver lives."""
        from nemotron_recipes.executors.local import process_tree

        # The name alone doesn't decide: a laptop's changes with the network that it is in.
        if not is_of_this_host(handle) and not process_tree.members(handle.run):
            host = handle.native["host"]
            what = f"run {handle.run} was started on {host}: this machine can't stop it"
            raise UserError(Problem(what, fix=f"run this command on {host}"))
        grace = _longest_grace(handle)
        driver = process_tree.find(handle.native["pid"], handle.native["created"], handle.run)
        if driver is not None:
            process_tree.ask(driver)
            process_tree.wait([driver], grace + _STOP_SLACK_SECONDS)  # it stops its stage, and records that
        left = self._stop_orphans(handle, grace)
        survivors = process_tree.stop(handle.run, grace)
        if survivors:
            raise JobFailed(f"run {handle.run}: processes {survivors} did not end, not even on SIGKILL")
        if not has_ended(handle):  # the driver was killed before it could say so
            end(RunDir(Path(handle.run_dir)), "cancelled", stage=None, attempt=None)
        if left:
            raise JobFailed(f"run {handle.run}: {'; '.join(left)}")

    def left_behind(self, handle: JobHandle) -> list[str]:
        """Nothing: all is on this machine, and the driver ends only after it."""
        return []

    def _unfit(self, plan: Plan) -> Iterator[Problem]:
        """What the machine can't do of the plan, looked at before anything is started."""
        yield from ()

    def _without_driver(self, handle: JobHandle) -> Liveness:
        """Of a run of this machine whose driver and processes are gone, and which nobody ended."""
        return "lost"

    def _stop_orphans(self, handle: JobHandle, grace: float) -> list[str]:
        """Stop what is no process of this machine's own; sentences on what could not be stopped."""
        return []


def driver_command(plan: Plan) -> tuple[tuple[str, ...], ...]:
    """What `Rendered.submit` holds."""
    return ((sys.executable, "-m", DRIVER, plan.run_dir),)


def has_ended(handle: JobHandle) -> bool:
    """Whether the newest driver recorded an end."""
    return _last_event(handle, "driver-started", "finished", "cancelled") in ("finished", "cancelled")


def _last_event(handle: JobHandle, *names: str) -> str:
    """The newest of these; "" before the first."""
    told = [entry["event"] for entry in read_jsonl(RunDir(Path(handle.run_dir)).events) if entry["event"] in names]
    return told[-1] if told else ""


def is_of_this_host(handle: JobHandle) -> bool:
    """Whether the run was started here, going by this machine's name."""
    return bool(handle.native["host"] == socket.gethostname())


def _misfits(plan: Plan) -> Iterator[Problem]:
    now = memory.read_memory()
    for stage in plan.stages:
        reserve = stage.placement.options.get("memory_reserve_gib")
        if reserve is not None and stage.reused is None:
            problem = memory.misfit(stage, reserve, checks.where(stage, "memory_reserve_gib"), now)
            yield from [problem] if problem else []


def _wait_for_start(run: RunDir, driver: subprocess.Popen[bytes], earlier: int) -> None:
    """Until the driver's first event after the `earlier` ones; JobFailed or UserError when it can't start."""
    from nemotron_recipes.executors.driver import BUSY

    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        exited = driver.poll()  # before the look at the events: a short run may have ended by then
        if any(
            e["event"] == "driver-started" and e["pid"] == driver.pid for e in list(read_jsonl(run.events))[earlier:]
        ):
            return
        if exited == BUSY:
            fix = f"follow it: nemotron runs logs -f {run.path.name}; stop it: nemotron runs cancel {run.path.name}"
            raise UserError(Problem(f"run {run.path.name} is running already", str(run.path), fix))
        if exited is not None:
            raise JobFailed(f"the driver ended with exit code {exited} before it started:\n{_tail(run.driver_log)}")
        time.sleep(0.02)
    driver.kill()  # it may be stuck too early to heed SIGTERM
    raise JobFailed(f"the driver did not start within {_START_SECONDS:.0f} s:\n{_tail(run.driver_log)}")


def _tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([*text[-lines:], f"log: {log}"])


def _longest_grace(handle: JobHandle) -> float:
    plan = read_json(RunDir(Path(handle.run_dir)).plan)
    stages = plan["stages"] if plan is not None else []
    found = [stage["placement"]["options"].get("grace_seconds", DEFAULT_GRACE_SECONDS) for stage in stages]
    return max(found, default=DEFAULT_GRACE_SECONDS)
