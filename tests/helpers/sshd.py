"""A real sshd on loopback in front of a cluster: its own keys, its own configuration, a port that the kernel chose.

A listener of ours takes the connections and gives each to an `sshd -i`: so a test can cut them, refuse them, and count.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.helpers import slurm

PROGRAM = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))


def require() -> None:
    """Skip the test where there is no sshd."""
    if PROGRAM is None or shutil.which("ssh") is None:
        pytest.skip("no sshd here; make test-system installs it")


@dataclass
class Server:
    """One sshd, and what a user needs to reach it as the Host `cluster`."""

    folder: Path
    listener: socket.socket
    env: dict[str, str]
    accepted: int = 0
    refusing: bool = False
    sessions: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    @property
    def config(self) -> Path:
        """The user's ssh configuration."""
        return self.folder / "ssh_config"

    @property
    def home(self) -> Path:
        """A home for whoever uses it: our own connections lie there."""
        return self.folder / "home"

    def profile(self, folder: Path, **fields: str) -> str:
        """The lines of a profile that goes through it; runs and the store lie in `folder`."""
        lines = {"executor": "slurm", "tunnel": "ssh", "host": "cluster", "ssh_config": str(self.config)}
        lines |= {"remote_job_dir": str(folder), "remote_python": sys.executable, "python": sys.executable}
        lines |= {"account": "lab", "time": "5", **fields}
        return "".join(f'{key} = "{value}"\n' for key, value in lines.items() if value)

    def cut(self) -> None:
        """End all connections as a network would: without a word to either side."""
        for session in self.sessions:
            for process in _below(session.pid):
                with contextlib.suppress(psutil.NoSuchProcess):  # it may end by itself at any moment
                    if process.name() == "sshd":
                        process.kill()
        for session in self.sessions:
            session.wait()
        self.sessions.clear()

    def freeze(self, frozen: bool = True) -> None:
        """Let all connections fall silent, as where a laptop sleeps; or go on."""
        for session in self.sessions:
            for process in _below(session.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def log(self) -> str:
        """What all the sshd have said."""
        file = self.folder / "sshd.log"
        return file.read_text() if file.exists() else ""

    def serve(self) -> None:
        """Until the listener is closed."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, open(self.folder / "sshd.log", "ab") as log:
                if self.refusing:
                    continue
                self.accepted += 1
                argv = [str(PROGRAM), "-i", "-e", "-f", str(self.folder / "sshd_config")]
                self.sessions.append(
                    subprocess.Popen(argv, stdin=connection, stdout=connection, stderr=log, env=self.env)
                )


def key(path: Path) -> Path:
    """A new pair of keys."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=60)
    return path


@contextlib.contextmanager
def server(env: dict[str, str], *lines: str) -> Iterator[Server]:
    """An sshd whose sessions have `env` (SLURM_CONF, ...), until the block ends; its masters end with it.

    lines  of its configuration, before those that all have
    """
    folder = Path(tempfile.mkdtemp(prefix="sshd-"))  # short: sockets lie below it
    (folder / "home").mkdir(mode=0o700)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    host, user = key(folder / "host_key"), key(folder / "user_key")
    (folder / "authorized_keys").write_text(Path(f"{user}.pub").read_text())
    environment = " ".join(f'"{name}={value}"' for name, value in env.items())
    (folder / "sshd_config").write_text(
        "".join(f"{line}\n" for line in (*lines, *([f"SetEnv {environment}"] if env else [])))
        + f"HostKey {host}\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\nMaxStartups 100\n"
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    made = Server(folder, listener, slurm.outside())
    words = Path(f"{host}.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{made.port} {' '.join(words)}\n")
    made.config.write_text(
        f"Host cluster\n  HostName 127.0.0.1\n  Port {made.port}\n  IdentityFile {user}\n  IdentitiesOnly yes\n"
        f"  User {psutil.Process().username()}\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
    )
    thread = threading.Thread(target=made.serve, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        made.cut()
        for process in psutil.process_iter(["cmdline"]):  # connections that were kept
            if any(str(folder) in word for word in process.info["cmdline"] or ()) and process.pid != os.getpid():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _below(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
