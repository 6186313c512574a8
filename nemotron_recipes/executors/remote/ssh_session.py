"""Sessions with an agent at the other end of an SSH connection, and what is sent along for it to call.

A connection may also fall silent: a laptop slept, a network is gone, a shared connection is dead. While something is
waited for, the agent is asked for a sign of life; without any, what is waited for ends as Unreachable.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.remote import agent, ssh_login
from nemotron_recipes.executors.remote.ssh_login import Login, environment, failure, shell_words
from nemotron_recipes.executors.remote.transport import Unreachable

# What the other machine may be asked to run; all that these import of this project goes with them.
CALLED = (
    "nemotron_recipes.executors.remote.there",
    "nemotron_recipes.executors.remote.there_changes",
    "nemotron_recipes.executors.hosts.needed_files",
    "nemotron_recipes.executors.hosts.links",
    "nemotron_recipes.executors.images.importing",
    "nemotron_recipes.executors.memory",
    "nemotron_recipes.planning.there",
)
START_SECONDS = ssh_login.START_SECONDS
ASK_SECONDS, SILENT_SECONDS = 15.0, 90.0  # for a sign of life; beyond what ssh itself takes to see a dead network
REST_SECONDS = 3.0  # after a failure nobody tries again for a moment
_NOISE = 1_000_000  # bytes of a login's greetings
_CHUNK = 65536
_FULL_SECONDS = 1.0  # how often a pipe that nobody empties is tried again


class Connection:
    """One session with an agent at the other end; opened at the first call, and again when it was lost."""

    def __init__(self, login: Login):
        self.login = login
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._failed: tuple[float, Unreachable] | None = None

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` there."""
        return self._open().call(function, args)

    def close(self) -> None:
        """End the session; the connection itself stays for the next command."""
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def _open(self) -> Session:
        with self._lock:
            if self._session is not None and self._session.lost is None:
                return self._session
            if self._failed is not None and time.monotonic() < self._failed[0]:
                raise self._failed[1]
            began = time.monotonic()
            try:
                ssh_login.log_in(self.login)
                self._session = Session(self.login)
            except (Unreachable, UserError) as error:
                # What this machine lacks for it, too: a run whose ssh_config is gone must not be in the way of others.
                why = error if isinstance(error, Unreachable) else _said_as_unreachable(error)
                now = time.monotonic()  # who waits for long in vain does not wait again at once for the next question
                self._failed = (now + max(REST_SECONDS, now - began), why)
                raise why from None
            return self._session


class Session:
    """The ssh process, and who waits for which answer."""

    def __init__(self, login: Login):
        self.login, self.lost = login, None  # type: tuple[Login, Unreachable | None]
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        first = "import sys,json;m=json.loads(sys.stdin.readline());exec(m['agent']);serve(m['texts'])"
        check = f"import sys;sys.version_info<{agent.OLDEST} and sys.exit('nemotron: this is Python '+sys.version[:6]);"
        self._process = subprocess.Popen(
            [*login.argv("-T", "-o", "BatchMode=yes"), shell_words([login.python, "-u", "-c", check + first])],
            env=environment(),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for this process, which may have something to finish there
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        self._silent: Unreachable | None = None  # what it was given up for
        self._began, self._over = threading.Event(), threading.Event()
        self._moved = time.monotonic()  # when something was heard, sent, or asked for last
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()
        hello = json.dumps({"agent": _text_of(agent), "texts": _sources()})
        with contextlib.suppress(OSError):  # it has ended: `lost` says why
            self._send(hello)
        self._began.wait()  # `_listen` sees to it that it comes
        if self.lost is not None:
            raise self.lost

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        number, future = next(self._numbers), Future[dict[str, Any]]()
        with self._lock:
            if self.lost is not None:
                raise self.lost
            if not self._waiting:
                self._moved = time.monotonic()  # nobody has listened until now
            self._waiting[number] = future
        call = {"module": function.__module__, "function": function.__name__, "args": agent.plain(list(args))}
        try:
            self._send(json.dumps({"id": number, **call}))
        except OSError:
            self._end(self._why())
        said = future.result()
        if "oserror" in said:
            code, words, name = said["oserror"]
            raise OSError(code, words, f"{self.login.host}:{name}" if name else self.login.host)
        if "error" in said:
            problems = [Problem(*problem) for problem in said["problems"]]
            raise UserError(*(problems or [Problem(f"{self.login.host}: {said['error']}")]))
        return agent.unplain(said["value"])

    def close(self) -> None:
        self._end(Unreachable(f"the connection to {self.login.target} was closed"))

    def _send(self, line: str) -> None:
        """Whole, or OSError. A piece that ssh has taken is a sign of life: large ones take their time."""
        data = memoryview(f"{line}\n".encode())
        with self._writing:
            while data:
                try:
                    data = data[os.write(self._stdin, data[:_CHUNK]) :]
                    self._moved = time.monotonic()
                except BlockingIOError:
                    if self._over.is_set():  # a shared connection that hangs may hold the pipe open for ever
                        raise BrokenPipeError from None
                    select.select([], [self._stdin], [], _FULL_SECONDS)

    def _listen(self) -> None:
        """End the session when nothing moves although something is waited for."""
        while not self._over.wait(min(ASK_SECONDS, SILENT_SECONDS / 4)):
            with self._lock:
                waited_for = bool(self._waiting) or not self._began.is_set()
            limit = SILENT_SECONDS if self._began.is_set() else START_SECONDS
            if waited_for and time.monotonic() - self._moved > limit:
                fix = ssh_login.how_to_end(self.login)
                self._silent = Unreachable(f"{self.login.target} has not answered for {limit:.0f} s", fix)
                ssh_login.end_ours(self.login)  # `_read` may be the first to see its end
                self._end(self._silent)
            elif waited_for and self._began.is_set() and self._writing.acquire(blocking=False):
                with contextlib.suppress(OSError):  # full: nobody reads; or it has ended, as `_read` finds
                    os.write(self._stdin, b"{}\n")
                self._writing.release()

    def _lines(self) -> Iterator[bytes]:
        """What comes from there; every byte is a sign of life."""
        rest = bytearray()
        while data := os.read(self._stdout, _CHUNK):
            self._moved = time.monotonic()
            *whole, last = data.split(b"\n")
            for end in whole:
                yield bytes(rest + end)
                rest.clear()
            rest += last

    def _read(self) -> None:
        noise = 0
        for line in self._lines():
            if self._began.is_set():
                try:
                    said = json.loads(line)
                    number = said.get("id")  # a sign of life has none
                except (ValueError, AttributeError):  # something else speaks there
                    break
                with self._lock:
                    future = self._waiting.pop(number, None)
                if future is not None:
                    future.set_result(said)
            elif line == agent.MARK.encode():  # what profiles print at a login comes before it
                self._began.set()
            else:
                noise += len(line)
                if noise > _NOISE:
                    break
        self._end(self._why())

    def _end(self, why: Unreachable) -> None:
        with self._lock:
            if self.lost is None:
                self.lost = why
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(self.lost)
        if self._process.poll() is None:
            self._process.kill()
        self._over.set()
        self._began.set()

    def _why(self) -> Unreachable:
        if self._silent is not None:
            return self._silent
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace")
        code = self._process.poll()
        if code == 127 or "nemotron: this is Python" in said:
            words = said.strip().splitlines()[-1:] or ["it is not there"]
            fix = "set remote_python to a Python 3.10 or newer on the login node"
            return Unreachable(f"{self.login.target} has no {self.login.python} that would do: {words[0]}", fix)
        if self._began.is_set():
            return Unreachable(f"the connection to {self.login.target} was lost")
        return failure(self.login, said)


def _said_as_unreachable(error: UserError) -> Unreachable:
    fixes = dict.fromkeys(problem.fix for problem in error.problems if problem.fix)
    return Unreachable("; ".join(problem.what for problem in error.problems), "; ".join(fixes))


@functools.cache
def _sources() -> dict[str, str]:
    """Module -> its text, of those that are called there, and of all of this project that they import at once."""
    texts: dict[str, str] = {}
    wanted = [*CALLED]
    while wanted:
        name = wanted.pop()
        if name in texts or not _is_module(name):
            continue
        texts[name] = _text_of(import_module(name))
        parents = [name.rpartition(".")[0]] if "." in name else []
        wanted += [*parents, *_imported(ast.parse(texts[name]))]
    return texts


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(agent.PACKAGE):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # it may be a module as well


def _text_of(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text(encoding="utf-8")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a name in a module that is no package
        return False
