"""Executors: each turns a Plan into exact bytes and argv, submits just those, and knows what became of them.

To add one: a module here with a class that has the members of `Executor`, a row in `REGISTRY`, a commented profile in
env.toml, and a green executor contract suite (tests/contract). nemo_run is imported only below this package, and only
inside the functions that submit or render with it: it costs seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

from nemotron_recipes.errors import Problem
from nemotron_recipes.spec import Examination, JobHandle, Liveness, Outlook, Plan, Rendered, StagePlan, Tree, Wait

REGISTRY = {
    "local": "nemotron_recipes.executors.local.executor:LocalExecutor",
    "docker": "nemotron_recipes.executors.docker.executor:DockerExecutor",
    "slurm": "nemotron_recipes.executors.slurm.executor:SlurmExecutor",
}

# Between SIGTERM and SIGKILL, where an executor decides it and the profile says nothing.
DEFAULT_GRACE_SECONDS = 10.0


class Executor(Protocol):
    """What the lifecycle asks of an executor."""

    name: str
    profile_model: type[Any]  # a pydantic model: every field that a profile, or `run.*`, may set
    detaches: bool  # whether Ctrl-C on a followed run leaves it running; False: it stops the run
    at_once: int | None  # how many runs of a sweep go on side by side unless somebody says; None: the scheduler decides
    ask_seconds: float  # at most every so many seconds a follower that has waited for long asks how a run stands

    def check(self, stage: StagePlan) -> list[Problem]:
        """Everything about the placement that can't work. Pure."""
        ...

    def render(self, plan: Plan) -> Rendered:
        """Exact files, argv and environment. Pure: no file is written, no process is started."""
        ...

    def preflight(self, plan: Plan, beside: Sequence[Plan] = ()) -> list[Problem]:
        """Everything that the machine or cluster will not take, asked before the run folder is written.

        beside   what the same command submits with it: the other runs of a sweep
        """
        ...

    def examine(self, profile: Tree) -> Examination:
        """What there is to know before the first run: findings, and a profile that would fit."""
        ...

    def look_into_nodes(self, profile: Tree, folder: str, patience: float) -> Examination:
        """What a short job finds on the nodes, which all see `folder`; it may wait `patience` seconds for its start.

        The suggestion holds what is to be changed in a profile. UserError: there is no scheduler.
        """
        ...

    def submit(self, plan: Plan, rendered: Rendered) -> JobHandle:
        """Send exactly `rendered`. Its files are already on disk. Returns once the run is accepted."""
        ...

    def together(self, handles: Sequence[JobHandle]) -> Executor:
        """One that has asked once for all of these runs, to read and settle them; it says what was so then."""
        ...

    def liveness(self, handle: JobHandle) -> Liveness:
        """Whether anybody still runs it. Never blocks for long, never writes."""
        ...

    def look(self, handle: JobHandle) -> Outlook:
        """The same with what the scheduler says of each job. Blocks at most as long as its commands may."""
        ...

    def waits(self, handle: JobHandle) -> list[Wait]:
        """Why jobs have not started, with the limits that they hit; it may ask the scheduler many things."""
        ...

    def differences(self, handle: JobHandle) -> list[str]:
        """Sentences that say where the executor's own sources, and the run folder, disagree about the run."""
        ...

    def shell(self, handle: JobHandle, stage: str, command: Sequence[str]) -> list[str]:
        """argv that runs `command`, with this terminal, where the stage runs. UserError where it runs nowhere."""
        ...

    def settle(self, handle: JobHandle) -> list[Tree]:
        """Of a run that has ended: the launcher's events (docs/contracts.md) that nobody could write; mostly none.

        They are appended to the run's events where this user may write, so that they outlast the scheduler's memory.
        """
        ...

    def tidy(self, handle: JobHandle) -> list[str]:
        """Of a run that has not succeeded: take away what it has left in a queue for ever; sentences on that."""
        ...

    def left_behind(self, handle: JobHandle) -> list[str]:
        """Sentences on what a run that has ended may have left running, which `cancel` takes away. Asks nobody."""
        ...

    def cancel(self, handle: JobHandle) -> None:
        """Stop the whole run and everything that it started; returns when it has stopped."""
        ...


def get_executor(name: str) -> Executor:
    """The executor of that name; the schema has checked that it is registered."""
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(import_module(module), attribute)()
