"""The one process that holds a cluster: it starts daemons, ends them with all that they started, and cleans up.

It lives apart from the terminal that started it and ends when it is told to (a request, SIGTERM), or when the process
it was told to outlive no longer exists. Whichever it is, no process of the cluster and no folder stays.

Each daemon runs below a guard, a fork of the keeper that adopts the daemon's orphans: the guard's tree is the node.
When the keeper itself is killed, the guards end their trees.

A request is one line of JSON on the control socket, {"do": "start" | "kill" | "list" | "down", "name": ...}; the
answer is one line, {"error": text} or what was asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, NoReturn

from slurm import isolation, orphans, proctree
from slurm.services import Service, services
from slurm.spec import Spec

REQUEST_SECONDS = 30.0
ORPHAN_SECONDS = 0.5  # between two looks at what has lost its parent


def keep(spec: Spec, while_pid: int | None = None) -> None:
    """Serve the cluster of `spec` until it ends; its folder exists and is deleted at the end."""
    Keeper(spec).serve(while_pid)


def ask(control: Path, request: dict[str, str]) -> dict[str, Any]:
    """The keeper's answer; its error, or its silence, as RuntimeError.

    ConnectionError or FileNotFoundError when no keeper is there, PermissionError when it is another user's.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(REQUEST_SECONDS)
        connection.connect(str(control))
        connection.sendall(json.dumps(request).encode() + b"\n")
        try:
            with connection.makefile("rb") as stream:
                line = stream.readline()
        except TimeoutError:
            raise RuntimeError(f"the keeper has not answered for {REQUEST_SECONDS:g} s: {request}") from None
    if not line:
        raise ConnectionResetError(f"the keeper of {control.parent.parent} ended before it answered")
    answer = json.loads(line)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


class Keeper:
    """`guards`: per service, guard's pid -> daemon's pid. A guard whose daemon died may still hold job steps."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.services = services(spec)
        self.guards: dict[str, dict[int, int]] = {name: {} for name in self.services}
        self.codes: dict[str, int] = {}  # of the daemons that ended; 256 - N for signal N
        self.ports: list[socket.socket] = []
        self.ended = False

    def serve(self, while_pid: int | None) -> None:
        proctree.become_subreaper()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.ports = _hold_ports(self.spec)
        with selectors.DefaultSelector() as selector, _wakeup(signal.SIGTERM, signal.SIGCHLD) as wakeup:
            (self.spec.files.run / "keeper.pid").write_text(f"{os.getpid()}\n")
            listener = _listen(self.spec.files.control_socket)
            selector.register(listener, selectors.EVENT_READ, self._accept)
            selector.register(wakeup, selectors.EVENT_READ, self._signalled)
            if while_pid is not None:
                selector.register(os.pidfd_open(while_pid), selectors.EVENT_READ, lambda _: self.down())
            while not self.ended:
                for key, _ in selector.select():
                    key.data(key.fileobj)
                    self._reap()
            listener.close()

    def start(self, name: str) -> dict[str, Any]:
        service = self.services[name]
        if self._running(name):
            return {"pid": self._running(name)}
        guard, daemon = _start_guard(service, self.spec)
        self.guards[name][guard] = daemon
        return {"pid": daemon}

    def kill(self, name: str) -> dict[str, Any]:
        proctree.kill_trees(list(self.guards[name]))
        self._reap()
        return {}

    def rows(self) -> dict[str, Any]:
        """Per service the daemon's pid (0: none runs), the last one's exit code, how many processes there are."""
        return {
            name: {
                "pid": self._running(name),
                "exit_code": self.codes.get(name),
                "processes": len(proctree.with_descendants([*guards]) - set(guards)),
            }
            for name, guards in self.guards.items()
        }

    def down(self) -> dict[str, Any]:
        proctree.kill_trees([guard for guards in self.guards.values() for guard in guards])
        for port in self.ports:
            port.close()
        shutil.rmtree(self.spec.folder)
        self.ended = True
        return {"keeper": os.getpid()}

    def _running(self, name: str) -> int:
        return next((daemon for guard, daemon in self.guards[name].items() if proctree.is_child(daemon, guard)), 0)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(REQUEST_SECONDS)
        with connection, contextlib.suppress(TimeoutError, ConnectionError):  # of a client that went away
            with connection.makefile("rb") as stream:
                line = stream.readline()
            connection.sendall(json.dumps(self._answer(line)).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            do, name = request["do"], request.get("name", "")
            if do in ("start", "kill"):
                if name not in self.services:
                    return {"error": f"no daemon is called {name!r}; there are {', '.join(self.services)}"}
                return self.start(name) if do == "start" else self.kill(name)
            return {"list": self.rows, "down": self.down}[do]()
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"not a request: {line!r} ({error!r})"}
        except OSError as error:
            return {"error": str(error)}

    def _signalled(self, wakeup: socket.socket) -> None:
        if signal.SIGTERM in wakeup.recv(4096) and not self.ended:
            self.down()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                for name, guards in self.guards.items():
                    if guards.pop(ended[0], None):
                        self.codes[name] = os.waitstatus_to_exitcode(ended[1])


def _start_guard(service: Service, spec: Spec) -> tuple[int, int]:
    """The pids of the guard and of the daemon; OSError when the daemon could not be started."""
    keeper = os.getpid()
    reader, writer = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(reader)
        _guard(service, spec, keeper, writer)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    if not text.isdecimal():
        raise OSError(f"{service.name} could not be started: {text or 'its guard died'}")
    return guard, int(text)


def _guard(service: Service, spec: Spec, keeper: int, writer: int) -> NoReturn:
    """Run the daemon, adopt and reap whatever it leaves, end with the last of them, by the daemon's exit code."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: _end_guard())
        os.setsid()
        proctree.become_subreaper()
        if service.node and spec.isolated:
            isolation.enter(service.node, spec.files.hosts)
        proctree.die_with_parent(signal.SIGTERM, keeper)  # after that: a new user namespace cancels it
        daemon = _start_daemon(service, spec)
        os.write(writer, str(daemon.pid).encode())
        os.close(writer)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the keeper's sockets: its ports are free again when it ends
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # after the daemon's start, which would inherit it
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, ended = os.waitpid(-1, os.WNOHANG)
                if pid == daemon.pid:
                    status = os.waitstatus_to_exitcode(ended) & 0xFF
                elif pid == 0:
                    signal.sigtimedwait({signal.SIGCHLD}, ORPHAN_SECONDS if service.node else 3600)
                    if service.node:
                        orphans.end_orphans(os.getpid())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.write(writer, str(error).encode())
    finally:
        os._exit(status)


def _end_guard() -> NoReturn:
    proctree.kill_trees([os.getpid()])
    os._exit(0)


def _start_daemon(service: Service, spec: Spec) -> subprocess.Popen[bytes]:
    guard = os.getpid()
    with open(spec.files.log / f"{service.name}.out", "ab") as log:
        return subprocess.Popen(
            service.argv,
            env=service.env,
            cwd=spec.files.log,
            stdin=subprocess.DEVNULL,
            stdout=log,  # a file: a daemon that outlives a pipe's reader dies of its next word
            stderr=log,
            preexec_fn=lambda: proctree.die_with_parent(signal.SIGKILL, guard),
        )


def _hold_ports(spec: Spec) -> list[socket.socket]:
    """Bound and never listening: Slurm, which sets SO_REUSEADDR, gets them; nobody looking for a free port does."""
    held = []
    for port in spec.ports:
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", port))
        held.append(holder)
    return held


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(16)
    return listener


@contextlib.contextmanager
def _wakeup(*signals: signal.Signals) -> Any:
    """A socket that gets a byte, the signal's number, for each of `signals`."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for sig in signals:
        signal.signal(sig, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(-1)
        reader.close()
        writer.close()
