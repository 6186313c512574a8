"""A machine behind `ssh`: the user's own OpenSSH with the user's own configuration, and one connection for everything.

NeMo-Run's SSHTunnel is not used: it connects with paramiko, which it lets add unknown host keys, and copies files by
rsync over a connection of another program with other rules.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors import agent, replica
from nemotron_recipes.executors.transport import Unreachable
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import RUN_ID_ENV

# What the other machine may be asked to run; all that these import of this project goes with them.
CALLED = (
    "nemotron_recipes.executors.there",
    "nemotron_recipes.executors.host_files",
    "nemotron_recipes.executors.links",
    "nemotron_recipes.executors.memory",
    "nemotron_recipes.planning.there",
)
CONNECT_SECONDS, ALIVE_SECONDS, START_SECONDS = 20, 15, 90.0
KEPT_SECONDS = 600  # our own connection stays open for the next command
REST_SECONDS = 3.0  # after a failure nobody tries again for a moment
_LONGEST_SOCKET = 85  # sun_path holds 108 bytes, and ssh adds 17 while it makes it
_NOISE = 1_000_000  # characters of a login's greetings

# Runs its arguments until they end, or until its own input does.
_WHILE_CONNECTED = """
exec 3<&0
"$@" </dev/null & command=$!
( cat <&3; kill $command ) >/dev/null 2>&1 & watch=$!
wait $command; code=$?
kill $watch 2>/dev/null
exit $code
"""

_KNOW = "log in once by hand and compare the key's fingerprint with the one that the site has published: ssh "
_REASONS = (
    ("IDENTIFICATION HAS CHANGED", "its host key is not the one that is known", "ask the site; then ssh-keygen -R "),
    ("Host key verification failed", "its host key is not known", _KNOW),
    ("host key is known for", "its host key is not known", _KNOW),
    ("Permission denied", "it refuses the login", "set user and identity, or load the key into your agent; try: ssh "),
    ("Too many authentication", "it refuses the login", "set identity to the one key that it takes; try: ssh "),
    ("Could not resolve hostname", "its name is not known", "mend host, or your ssh configuration; try: ssh "),
    ("bad configuration option", "your ssh configuration has a mistake", "try: ssh "),
    ("UNPROTECTED PRIVATE KEY FILE", "ssh refuses the key file for its mode", "chmod 600 the key; try: ssh "),
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
        """ssh with everything but the command. UserError: the place for the connection can't be made."""
        folder = _own_folder()
        argv = ["ssh", "-F", str(_configuration(folder, self.config)), *options]
        argv += ["-o", f"ConnectTimeout={CONNECT_SECONDS}", "-o", f"ServerAliveInterval={ALIVE_SECONDS}"]
        if self.identity:
            argv += ["-i", os.path.expanduser(self.identity), "-o", "IdentitiesOnly=yes"]
        if _control_path(self) is None:
            socket = folder / hashlib.sha256(repr(self).encode()).hexdigest()[:16]
            if len(str(socket)) <= _LONGEST_SOCKET:
                argv += ["-o", "ControlMaster=auto", "-o", f"ControlPath={socket}"]
                argv += ["-o", f"ControlPersist={KEPT_SECONDS}"]
        return [*argv, "--", self.target]


def shell_words(argv: Iterable[str]) -> str:
    """One command for a login shell there, whatever the user's own shell is: its profile makes modules and paths."""
    return f"exec sh -lc {shlex.quote('exec ' + shlex.join(argv))}"


def environment() -> dict[str, str]:
    """For ssh: its connections outlive the run that made them, and are none of its processes."""
    return {name: value for name, value in os.environ.items() if name != RUN_ID_ENV}


class Connection:
    """One session with an agent at the other end; opened at the first call, and again when it was lost."""

    def __init__(self, login: Login):
        self.login = login
        self._lock = threading.Lock()
        self._session: _Session | None = None
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

    def _open(self) -> _Session:
        with self._lock:
            if self._session is not None and self._session.lost is None:
                return self._session
            if self._failed is not None and time.monotonic() < self._failed[0]:
                raise self._failed[1]
            try:
                _log_in(self.login)
                self._session = _Session(self.login)
            except (Unreachable, UserError) as error:
                # What this machine lacks for it, too: a run whose ssh_config is gone must not be in the way of others.
                why = error if isinstance(error, Unreachable) else _said_as_unreachable(error)
                self._failed = (time.monotonic() + REST_SECONDS, why)
                raise why from None
            return self._session


class _Session:
    """The ssh process, and who waits for which answer."""

    def __init__(self, login: Login):
        self.login, self.lost = login, None  # type: tuple[Login, Unreachable | None]
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        first = "import sys,json;m=json.loads(sys.stdin.readline());exec(m['agent']);serve(m['texts'])"
        check = f"import sys;sys.version_info<{agent.OLDEST} and sys.exit('nemotron: this is Python '+sys.version[:6]);"
        self._process = subprocess.Popen(
            [*login.argv("-T", "-o", "BatchMode=yes"), shell_words([login.python, "-u", "-c", check + first])],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this process, which may have something to finish there
        )
        self._began = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        hello = json.dumps({"agent": _text_of(agent), "texts": _sources()})
        with contextlib.suppress(OSError):  # it has ended: `lost` says why
            self._send(hello)
        if not self._began.wait(START_SECONDS):
            self._end(Unreachable(f"{login.target} did not start a session within {START_SECONDS:.0f} s"))
        if self.lost is not None:
            raise self.lost

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        number, future = next(self._numbers), Future[dict[str, Any]]()
        with self._lock:
            if self.lost is not None:
                raise self.lost
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
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        noise = 0
        for line in self._process.stdout:  # what profiles print at a login comes before the mark
            if line.rstrip("\n") == agent.MARK:
                self._began.set()
                break
            noise += len(line)
            if noise > _NOISE:
                break
        if self._began.is_set():
            for line in self._process.stdout:
                try:
                    said = json.loads(line)
                except ValueError:  # cut short by the end of the connection, or something else speaks there
                    break
                with self._lock:
                    future = self._waiting.pop(said["id"], None)
                if future is not None:
                    future.set_result(said)
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
        self._began.set()

    def _why(self) -> Unreachable:
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

    def feed(self, argv: list[str]) -> subprocess.Popen[bytes]:
        """Over the same connection, a command whose input this process writes; its stderr is a pipe."""
        return subprocess.Popen(
            [*self.connection.login.argv("-T", "-o", "BatchMode=yes"), shell_words(argv)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
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


def failure(login: Login, said: str) -> Unreachable:
    """What ssh's words mean."""
    for words, reason, fix in _REASONS:
        if words.lower() in said.lower():
            config = f"-F {shlex.quote(login.config)} " if login.config and "ssh " in fix[-4:] else ""
            return Unreachable(f"{login.target} can't be reached: {reason}", f"{fix}{config}{login.target}")
    lines = [line for line in said.splitlines() if line.strip()]
    return Unreachable(f"{login.target} can't be reached: {lines[-1] if lines else 'ssh says nothing'}")


def _said_as_unreachable(error: UserError) -> Unreachable:
    fixes = dict.fromkeys(problem.fix for problem in error.problems if problem.fix)
    return Unreachable("; ".join(problem.what for problem in error.problems), "; ".join(fixes))


def _log_in(login: Login) -> None:
    """Make the connection that the session then uses: here ssh may ask for passwords and codes."""
    try:
        if subprocess.run(login.argv("-O", "check"), capture_output=True, timeout=CONNECT_SECONDS).returncode == 0:
            return
        somebody = sys.stdin.isatty() and sys.stderr.isatty()
        with tempfile.TemporaryFile() as errors:  # no pipe: the connection that stays would keep it open
            argv = [*login.argv("-T", "-o", f"BatchMode={'no' if somebody else 'yes'}"), "exit 0"]
            done = subprocess.run(
                argv,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                timeout=None if somebody else START_SECONDS,
            )
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace")
    except FileNotFoundError:
        raise Unreachable("ssh is not on the PATH of this machine", "install OpenSSH's client") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{login.target} did not answer within {START_SECONDS:.0f} s") from None
    if done.returncode:
        raise failure(login, said)


@functools.cache
def _control_path(login: Login) -> str | None:
    """The user's own socket for shared connections, if the configuration has one."""
    command = ["ssh", "-F", str(_configuration(_own_folder(), login.config)), "-G", "--", login.target]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=CONNECT_SECONDS, check=False).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^controlpath (.+)$", told, re.MULTILINE)
    return found[1] if found and found[1] != "none" else None


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
