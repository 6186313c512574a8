"""Speaking to the machine that a run is on, and keeping what is known of it here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from nemotron_recipes.errors import NemotronError, Problem, UserError
from nemotron_recipes.executors import Executor, get_executor
from nemotron_recipes.executors.remote import sites, transport
from nemotron_recipes.spec import JobHandle


@contextmanager
def speaking_to(where: transport.Transport) -> Iterator[transport.Transport]:
    """Speak to that machine; that it can't be reached is the request's fault."""
    with transport.through(where):
        try:
            yield where
        except transport.Unreachable as error:
            raise UserError(Problem(str(error), fix=error.fix)) from None


@contextmanager
def at(handle: JobHandle) -> Iterator[Executor]:
    """The executor of a run, speaking to the run's own machine, with what is new there."""
    refresh(handle)
    with transport.through(sites.of_handle(handle)):
        yield get_executor(handle.executor)


def refresh(handle: JobHandle) -> None:
    """What can't be brought here now is said by whoever asks the scheduler; what is here stays."""
    with suppress(NemotronError, OSError):  # of one run among many: the others are shown
        sites.of_handle(handle).refresh()
