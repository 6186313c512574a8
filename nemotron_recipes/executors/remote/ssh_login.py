"""How a machine is reached by the user's own OpenSSH, with the user's own configuration, over one shared connection.

NeMo-Run's SSHTunnel is not used: it connects with paramiko, which it lets add unknown host keys, and copies files by
rsync over a connection of another program with other rules.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.remote.transport import Unreachable
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import RUN_ID_ENV

CONNECT_SECONDS, ALIVE_SECONDS, ALIVE_COUNT, START_SECONDS = 20, 15, 3, 90.0
_END_SECONDS = 5.0  # for one that hangs to end
KEPT_SECONDS = 600  # a connection that we have made stays open for the next command
_LONGEST_SOCKET = 85  # sun_path holds 108 bytes, and ssh adds 17 while it makes it

_JUMP_CLOSED = "UNKNOWN port 65535"  # what ssh calls the end of a ProxyJump or ProxyCommand
_KNOW = "log in once by hand and compare the key's fingerprint with the one that the site has published: ssh "
_ASKED = "nobody can answer here: run this once in a terminal, or open the connection by hand, and it will be used: "
_KEYS = "set user and identity, load the key into your agent, or, where it asks for a code, log in by hand first: ssh "
_NO_ANSWER = "look at host and at the network; try: ssh "
_REASONS = (
    ("IDENTIFICATION HAS CHANGED", "its host key is not the one that is known", "ask the site; then ssh-keygen -R "),
    ("Host key verification failed", "its host key is not known", _KNOW),
    ("host key is known for", "its host key is not known", _KNOW),
    ("denied (keyboard-interactive", "it asks for a password or a code", _ASKED),
    ("denied (password", "it asks for a password or a code", _ASKED),
    ("Permission denied", "it refuses the login", _KEYS),
    ("Too many authentication", "it refuses the login", "set identity to the one key that it takes; try: ssh "),
    ("Could not resolve hostname", "its name is not known", "mend host, or your ssh configuration; try: ssh "),
    ("bad configuration option", "your ssh configuration has a mistake", "try: ssh "),
    ("UNPROTECTED PRIVATE KEY FILE", "ssh refuses the key file for its mode", "chmod 600 the key; try: ssh "),
    ("Connection refused", "nothing there takes ssh connections", _NO_ANSWER),
    ("timed out", "it does not answer", _NO_ANSWER),
    ("No route to host", "it does not answer", _NO_ANSWER),
    ("unreachable", "it does not answer", _NO_ANSWER),
)


@dataclass(frozen=True)
class Login:
    """How a cluster's login node is reached. user, identity, config: None leaves it to the user's ssh configuration."""

    host: str
    user: str | None = None
    identity: str | None = None
    config: str | None = None  # instead of ~/.ssh/config
    python: str = "python3"

    @property
    def target(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    def argv(self, *options: str) -> list[str]:
        """ssh with everything but the command. UserError: what it needs on this machine is not here."""
        argv = [*self._ssh(), *options, "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
        argv += ["-o", f"ServerAliveInterval={ALIVE_SECONDS}", "-o", f"ServerAliveCountMax={ALIVE_COUNT}"]
        return [*argv, *_sharing(self), "--", self.target]

    def by_hand(self) -> str:
        """What a user types to open the connection that our commands then use."""
        return shlex.join([*self._ssh(), "-fNM", *_sharing(self, master=False), "--", self.target])

    def _ssh(self) -> list[str]:
        argv = ["ssh", "-F", str(_configuration(_own_folder(), self.config))]
        if self.identity:
            key = os.path.expanduser(self.identity)
            if not os.path.isfile(key):
                raise UserError(Problem(f"identity names {key}, which is not a file", fix="mend it in env.toml"))
            argv += ["-i", key, "-o", "IdentitiesOnly=yes"]
        return argv


def shell_words(argv: Iterable[str]) -> str:
    """One command for a login shell there, whatever the user's own shell is: its profile makes modules and paths."""
    return f"exec sh -lc {shlex.quote('exec ' + shlex.join(argv))}"


def environment() -> dict[str, str]:
    """For ssh: its connections outlive the run that made them, and are none of its processes."""
    return {name: value for name, value in os.environ.items() if name != RUN_ID_ENV}


def log_in(login: Login) -> None:
    """Make the connection that all sessions then use: here ssh may ask for passwords and codes. Unreachable."""
    try:
        if is_open(login):
            return
        somebody = sys.stdin.isatty() and sys.stderr.isatty()
        code, said = _try(login, "-o", f"BatchMode={'no' if somebody else 'yes'}", wait=somebody)
        if code and _JUMP_CLOSED in said:  # with a connection that is to stay, ssh drops what a jump's ssh has to say
            _, said = _try(login, "-o", "BatchMode=yes", "-o", "ControlPath=none")
    except FileNotFoundError:
        raise Unreachable("ssh is not on the PATH of this machine", "install OpenSSH's client") from None
    except subprocess.TimeoutExpired as late:
        raise Unreachable(f"{login.target} did not answer within {late.timeout:.0f} s") from None
    if code:
        raise failure(login, said)


def _try(login: Login, *options: str, wait: bool = False) -> tuple[int, str]:
    """(exit code, what ssh says) of a login that does nothing. `wait`: for somebody who answers."""
    with tempfile.TemporaryFile() as errors:  # no pipe: the connection that stays would keep it open
        argv = [*login.argv("-T", *options), "exit 0"]
        nothing = subprocess.DEVNULL
        limit = None if wait else START_SECONDS
        done = subprocess.run(
            argv, env=environment(), stdin=nothing, stdout=nothing, stderr=errors, timeout=limit, check=False
        )
        errors.seek(0)
        return done.returncode, errors.read().decode("utf-8", "replace")


def is_open(login: Login) -> bool:
    """Whether there is a shared connection, ours or one that the user has opened."""
    check = login.argv("-O", "check")
    return subprocess.run(check, capture_output=True, stdin=subprocess.DEVNULL, timeout=CONNECT_SECONDS).returncode == 0


def end_ours(login: Login) -> None:
    """After a connection has fallen silent: the next try makes another. A user's own stays: other things go over it."""
    with suppress(FileNotFoundError, subprocess.TimeoutExpired, UserError):
        if _shared_by_user(login) is None:
            argv = login.argv("-O", "exit")
            subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=_END_SECONDS)


def how_to_end(login: Login) -> str:
    """What to do about a silent connection of the user's own; "" where it is ours."""
    with suppress(UserError):
        if _shared_by_user(login) is not None:
            argv = [*login._ssh(), "-O", "exit", "--", login.target]
            return f"if your shared connection is dead, end it: {shlex.join(argv)}"
    return ""


def failure(login: Login, said: str) -> Unreachable:
    """What ssh's words mean."""
    way = " through its jump" if _JUMP_CLOSED in said else ""
    for words, reason, fix in _REASONS:
        if words.lower() in said.lower():
            if fix == _ASKED:
                return Unreachable(f"{login.target} can't be reached{way}: {reason}", f"{fix}{login.by_hand()}")
            config = f"-F {shlex.quote(login.config)} " if login.config and "ssh " in fix[-4:] else ""
            return Unreachable(f"{login.target} can't be reached{way}: {reason}", f"{fix}{config}{login.target}")
    lines = [line for line in said.splitlines() if line.strip()]
    return Unreachable(f"{login.target} can't be reached: {lines[-1] if lines else 'ssh says nothing'}")


def _sharing(login: Login, master: bool = True) -> list[str]:
    """Options for one connection that all commands share: at the user's own socket, else at one of ours."""
    user = _shared_by_user(login)
    if user is not None:
        socket, how, kept = user
        # Who is asked for each (ask, autoask), or says how long, is left alone. ControlMaster=no is also what ssh says
        # where only ControlPath is set: the login that we make then stays, else a code would be asked for twice.
        options = ["-o", "ControlMaster=auto"] if how in ("false", "no") and master else []
        return options + (["-o", f"ControlPersist={KEPT_SECONDS}"] if kept == "no" and master else [])
    socket = str(_own_folder() / hashlib.sha256(repr(login).encode()).hexdigest()[:16])
    if len(socket) > _LONGEST_SOCKET:
        return []
    options = ["-o", f"ControlPath={socket}"]
    return [*(["-o", "ControlMaster=auto", "-o", f"ControlPersist={KEPT_SECONDS}"] if master else []), *options]


@functools.cache
def _shared_by_user(login: Login) -> tuple[str, str, str] | None:
    """(socket, ControlMaster, ControlPersist) of the user's configuration; None where it names no socket."""
    command = [*login._ssh(), "-G", "--", login.target]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=CONNECT_SECONDS, check=False).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    found = dict(re.findall(r"^(control\w+) (.+)$", told, re.MULTILINE))
    if found.get("controlpath", "none") == "none":
        return None
    return found["controlpath"], found.get("controlmaster", "false"), found.get("controlpersist", "no")


def _configuration(folder: Path, named: str | None) -> Path:
    """The user's own after one line that nothing in it can take back; ssh hands the file on to every jump."""
    own = os.path.abspath(os.path.expanduser(named)) if named else os.path.expanduser("~/.ssh/config")
    if named and not os.path.isfile(own):
        raise UserError(Problem(f"ssh_config names {own}, which is not a file", fix="mend it in env.toml"))
    text = f'StrictHostKeyChecking yes\nInclude "{own}"\nInclude /etc/ssh/ssh_config\n'
    path = folder / f"config-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not path.exists():
        write_atomic(path, text, 0o600)
    return path


def _own_folder() -> Path:
    """Where the socket of our own connection and the configuration lie: nobody else may write there."""
    folder = Path.home() / ".nemotron" / "ssh"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise UserError(Problem(f"{folder} can't be made: {error.strerror}", fix="it holds the connection")) from None
    return folder
