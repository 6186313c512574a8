"""A machine behind `ssh` as a `Transport`: calls go over one connection, and a copy of the run's folder lies here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import IO, Any

from nemotron_recipes.executors.remote import replica
from nemotron_recipes.executors.remote.ssh_login import Login, environment, shell_words
from nemotron_recipes.executors.remote.ssh_session import Connection

# Runs its arguments until they end, or until its own input does.
_WHILE_CONNECTED = """
exec 3<&0
"$@" </dev/null & command=$!
( cat <&3; kill $command ) >/dev/null 2>&1 & watch=$!
wait $command; code=$?
kill $watch 2>/dev/null
exit $code
"""


class Remote:
    """A `Transport`: a connection, and where the run's folder lies here and there."""

    def __init__(self, connection: Connection, near: Path | None = None, far: str = ""):
        self.connection, self._near, self._far = connection, near, far
        self.name = connection.login.host
        self.native = {"remote": {**asdict(connection.login), "run_dir": far}}

    def at_terminal(self, argv: list[str]) -> list[str]:
        """Over the same connection, with a terminal there where there is one here."""
        return [*self.connection.login.argv("-t" if os.isatty(0) else "-T"), shell_words(argv)]

    def start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        """Over the same connection. sshd ends nobody who has lost theirs: a shell there does."""
        command = shell_words(["sh", "-c", _WHILE_CONNECTED, "sh", *argv])
        return subprocess.Popen(
            [*self.connection.login.argv("-T", "-o", "BatchMode=yes"), command],
            env=environment(),
            stdin=subprocess.PIPE,  # closed with this process
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def feed(self, argv: list[str], said: IO[bytes]) -> subprocess.Popen[bytes]:
        """Over the same connection, a command whose input this process writes; its stderr goes to the file `said`."""
        return subprocess.Popen(
            [*self.connection.login.argv("-T", "-o", "BatchMode=yes"), shell_words(argv)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )

    def refresh(self) -> None:
        """The copy of the run's folder."""
        if self._near is not None:
            replica.refresh(self.call, self._far, self._near)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Over the connection."""
        return self.connection.call(function, *args)

    def near(self, path: str | Path) -> Path:
        """Paths in the run's folder there, in the one here."""
        if self._near is None or not PurePosixPath(path).is_relative_to(self._far):
            return Path(path)
        return self._near / PurePosixPath(path).relative_to(self._far)

    def far(self, path: str | Path) -> str:
        """Paths in the run's folder here, in the one there."""
        if self._near is None or not Path(path).is_relative_to(self._near):
            return str(path)
        return str(PurePosixPath(self._far, Path(path).relative_to(self._near)))


_connections: dict[Login, Connection] = {}


def connection(login: Login) -> Connection:
    """The one of this process."""
    return _connections.setdefault(login, Connection(login))
