"""The network between the hosts of a run, watched while their ranks work: it may go while ssh, by another, stays."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nemotron_recipes.errors import NemotronError
from nemotron_recipes.executors.hosts import links
from nemotron_recipes.executors.hosts.network import Host, Link

LOOK_SECONDS = 1.0
_BACKLOG = 64


@dataclass(frozen=True)
class Fault:
    """What a host says is wrong: since when, and when it said so last, by time.monotonic."""

    why: str
    since: float
    seen: float


class Watch:
    """Both ends of every link are looked at by their own host, again and again, until `close`.

    The others also connect to the first host's address, through the interface that their ranks are pinned to: a link
    may be up at both ends and carry nothing. What can't be asked says nothing: whether a host is away is for others to
    judge.
    """

    def __init__(self, hosts: Sequence[Host], found: Sequence[Link], tell: Callable[[str, str], None]):
        """tell(event, words): the network has just gone ("link-down"), or is back ("link-up")"""
        self._tell = tell
        self._faults: dict[str, Fault] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        first, here = hosts[0], found[0].here
        self._door = socket.create_server((here.address, 0), backlog=_BACKLOG)
        self.port: int = self._door.getsockname()[1]
        self._spawn(self._open)
        self._spawn(self._look, first, lambda: links.fault(here.name, here.address))
        for host, link in zip(hosts[1:], found, strict=True):
            self._spawn(self._look, host, _asking(host, link, self.port))

    def down(self) -> tuple[float, str]:
        """For how many seconds it had been gone at the last look, and why in words; (0, "") while all is well."""
        with self._lock:
            faults = [*self._faults.items()]
        if not faults:
            return 0.0, ""
        seconds = max(fault.seen for _, fault in faults) - min(fault.since for _, fault in faults)
        return seconds, "; ".join(f"{host}: {fault.why}" for host, fault in sorted(faults))

    def close(self) -> None:
        """Look no more; does not wait for a look that is under way."""
        self._over.set()
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes who waits for a caller
        self._door.close()

    def _spawn(self, what: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=what, args=arguments, daemon=True).start()

    def _open(self) -> None:
        while not self._over.is_set():
            try:
                self._door.accept()[0].close()
            except OSError:
                self._over.wait(LOOK_SECONDS)

    def _look(self, host: Host, ask: Callable[[], str]) -> None:
        while not self._over.wait(LOOK_SECONDS):
            with suppress(NemotronError, OSError):
                self._note(host.name, ask())

    def _note(self, host: str, why: str) -> None:
        with self._lock:
            now, before = time.monotonic(), dict(self._faults)
            if why:
                self._faults[host] = Fault(why, before[host].since if host in before else now, now)
            else:
                self._faults.pop(host, None)
            changed = bool(self._faults) != bool(before) and not self._over.is_set()
            began = min((fault.since for fault in before.values()), default=now)
            if changed and why:
                self._tell("link-down", f"{host}: {why}")
            elif changed:
                self._tell("link-up", f"after {now - began:.0f} s")


def _asking(host: Host, link: Link, port: int) -> Callable[[], str]:
    end, to = link.there, link.here.address
    return lambda: str(host.where.call(links.knock, end.name, end.address, to, port))
