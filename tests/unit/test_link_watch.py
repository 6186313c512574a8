"""The watch over the network between hosts: what is seen of an interface, and what is made of it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.executors.hosts import links, watch
from nemotron_recipes.executors.hosts.network import End, Host, Link
from nemotron_recipes.executors.remote.transport import HERE, Unreachable


def test_what_is_wrong_with_an_interface_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_NET", tmp_path)
    (tmp_path / "lo").mkdir()
    for state, carrier, said in (("up", "1", ""), ("down", "", "lo is down"), ("unknown", "0", "lo is down")):
        (tmp_path / "lo" / "operstate").write_text(state)
        (tmp_path / "lo" / "carrier").write_text(carrier)
        assert links.fault("lo", "127.0.0.1").startswith(said) and bool(links.fault("lo", "127.0.0.1")) == bool(said)
    (tmp_path / "lo" / "carrier").write_text("1")
    assert links.fault("lo", "192.0.2.1") == "lo has lost its address 192.0.2.1"
    assert links.fault("gone0", "127.0.0.1") == "interface gone0 is gone"


class FakeOther:
    """A host whose answers are given; it can't be reached while there is none."""

    name = "other"

    def __init__(self) -> None:
        self.answer: str | None = None
        self.real = False
        self.asked = threading.Semaphore(0)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.asked.release()
        if self.real:
            return function(*arguments)
        answer = self.answer  # once: it may be changed meanwhile
        if answer is None:
            raise Unreachable("asleep")
        return answer

    def ask_twice(self) -> None:
        """Until two more looks have begun: what the first of them found has been noted."""
        while self.asked.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self.asked.acquire(timeout=60)


def test_it_tells_when_the_network_goes_and_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.01)
    end, other, told = End("lo", "127.0.0.1", 0, ()), FakeOther(), []
    hosts = [Host("spark1", 0, HERE), Host("spark2", 1, other)]  # type: ignore[arg-type]
    seen = watch.Watch(hosts, [Link(end, end, (1.0, 1.0))], lambda event, words: told.append((event, words)))
    try:
        other.ask_twice()
        assert (seen.down(), told) == ((0.0, ""), []), "a host that can't be asked says nothing of the network"
        other.answer = "no answer through x"
        other.ask_twice()
        assert seen.down()[1] == "spark2: no answer through x"
        other.answer = None
        other.ask_twice()
        assert seen.down()[1], "what was wrong stays so until somebody says otherwise"
        other.real = True  # really knocks at this machine's door
        other.ask_twice()
        assert seen.down() == (0.0, "")
        assert [event for event, _ in told] == ["link-down", "link-up"]
    finally:
        seen.close()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody listens, and nobody else can have it
        said = links.knock("lo", "127.0.0.1", "127.0.0.1", silent.getsockname()[1])
    assert "127.0.0.1 does not answer through lo: Connection refused" in said
