"""Connections over a real sshd on loopback: jumps, agents, a master that is open already, silence, and refusals."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron_recipes.executors.docker.control import Elsewhere, endpoint
from nemotron_recipes.executors.remote import ssh_login, ssh_session, there
from nemotron_recipes.executors.remote.ssh_login import Login
from nemotron_recipes.executors.remote.ssh_session import Connection
from nemotron_recipes.executors.remote.transport import Unreachable
from tests.helpers import sshd
from tests.helpers.slurm import wait_for

ME = getpass.getuser()


@pytest.fixture(scope="module")
def server() -> Iterator[sshd.Server]:
    sshd.require()
    with sshd.server({}) as found:
        yield found


@pytest.fixture(autouse=True)
def home(server: sshd.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(server.home))


def configured(path: Path, *texts: str) -> Login:
    """A login with a configuration of its own, and so with a connection of its own."""
    path.write_text("".join(texts))
    return Login("cluster", config=str(path))


def without(text: str, *words: str) -> str:
    return "".join(line for line in text.splitlines(True) if not any(word in line for word in words))


def test_through_a_jump(server: sshd.Server, tmp_path: Path) -> None:
    with sshd.server({}) as jump:
        jumping = jump.config.read_text().replace("Host cluster", "Host gate")
        inner = f"{server.config.read_text()}  ProxyJump gate\n"
        assert Connection(configured(tmp_path / "config", inner, jumping)).call(there.user) == ME
        assert jump.accepted == 1
        # A gate whose key is not known is refused, whatever the configuration says, before anybody logs in there.
        before = jump.log().count("Accepted publickey")
        (tmp_path / "empty").touch()
        strange = jumping.replace(f"{jump.folder}/known_hosts", str(tmp_path / "empty"))
        refused = configured(tmp_path / "strange", inner, f"{strange}  StrictHostKeyChecking no\n")
        with pytest.raises(Unreachable, match="through its jump: its host key is not known"):
            Connection(refused).call(there.user)
        assert jump.log().count("Accepted publickey") == before


def test_a_key_that_only_the_agent_has(server: sshd.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = without(server.config.read_text(), "IdentityFile", "IdentitiesOnly", "IdentityAgent")
    socket = server.folder / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL) as agent:
        try:
            wait_for(socket.exists, "the agent")
            monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
            with pytest.raises(Unreachable, match="it refuses the login") as caught:
                Connection(configured(tmp_path / "before", text)).call(there.user)
            assert "load the key into your agent" in caught.value.fix
            subprocess.run(["ssh-add", "-q", str(server.folder / "user_key")], check=True, timeout=60)
            assert Connection(configured(tmp_path / "after", text)).call(there.user) == ME
        finally:
            agent.terminate()


def test_a_second_factor_is_given_once_by_hand(tmp_path: Path) -> None:
    """The server wants two keys, of which our commands have one: only the user's own connection gets in."""
    with sshd.server({}, "AuthenticationMethods publickey,publickey") as strict:
        second = sshd.key(strict.folder / "second")
        with open(strict.folder / "authorized_keys", "a") as keys:
            keys.write(Path(f"{second}.pub").read_text())
        login = configured(tmp_path / "config", strict.config.read_text(), f"  ControlPath {strict.folder}/mux-%C\n")
        with pytest.raises(Unreachable, match="it refuses the login") as caught:
            Connection(login).call(there.user)
        assert "log in by hand" in caught.value.fix
        by_hand = ["ssh", "-F", str(login.config), "-i", str(second), "-fNM", "cluster"]
        subprocess.run(by_hand, check=True, timeout=60, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = strict.accepted
        for _ in range(2):
            connection = Connection(login)
            assert connection.call(there.user) == ME
            connection.close()
        assert strict.accepted == before, "the user's own connection is used"
        subprocess.run(["ssh", "-F", str(login.config), "-O", "exit", "cluster"], check=True, timeout=60)


def test_a_login_by_our_own_hand_stays_at_the_users_socket(server: sshd.Server, tmp_path: Path) -> None:
    """Where only ControlPath is set: else a code would be asked for twice."""
    login = configured(tmp_path / "config", server.config.read_text(), f"  ControlPath {server.folder}/own-%C\n")
    before = server.accepted
    assert Connection(login).call(there.user) == ME
    assert server.accepted == before + 1
    assert ssh_login.is_open(login) and [*server.folder.glob("own-*")]


def test_nobody_is_asked_for_a_passphrase(server: sshd.Server, tmp_path: Path) -> None:
    """With a terminal at hand, but nobody's at standard input, ssh must not wait there for an answer."""
    locked = shutil.copy(server.folder / "user_key", tmp_path / "locked")
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(locked)], check=True, timeout=60)
    login = configured(tmp_path / "config", without(server.config.read_text(), "IdentityFile"))
    pid, terminal = os.forkpty()
    if pid == 0:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        try:
            Connection(Login(login.host, identity=str(locked), config=login.config)).call(there.user)
        except Unreachable as error:
            os.write(1, str(error).encode())
        os._exit(0)
    said = b""
    try:
        while data := os.read(terminal, 4096):
            said += data
    except OSError:  # its end, as Linux says it
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    assert b"it refuses the login" in said and b"passphrase" not in said


@pytest.mark.parametrize(
    ("change", "said", "fix"),
    [
        ({"host": "no-such-host.invalid"}, "its name is not known", "mend host"),
        ({"user": "nobody-of-that-name"}, "it refuses the login", "set user"),
        ({"identity": "/no/key"}, "identity names /no/key, which is not a file", "mend it"),
        ({"python": "/no/python"}, "has no /no/python that would do", "remote_python"),
        ({"config": "Bad yes\n"}, "your ssh configuration has a mistake", "ssh -F"),
        ({"config": "Host cluster\n  HostName 127.0.0.1\n  Port 1\n"}, "nothing there takes ssh connections", "host"),
    ],
)
def test_what_is_wrong_is_said(
    server: sshd.Server, tmp_path: Path, change: dict[str, str], said: str, fix: str
) -> None:
    text = change.pop("config", server.config.read_text())
    login = configured(tmp_path / "config", text)
    with pytest.raises(Unreachable) as caught:
        Connection(Login(**{"host": login.host, "config": login.config, **change})).call(there.user)
    assert said in str(caught.value) and fix in caught.value.fix


def test_host_keys_are_held_against_what_is_known(server: sshd.Server, tmp_path: Path) -> None:
    """Whatever the user's own configuration says: an unknown or changed key is refused before anybody logs in."""
    words = Path(f"{sshd.key(tmp_path / 'other')}.pub").read_text().split()[:2]
    for name, known, said in (
        ("unknown", "", "its host key is not known"),
        ("changed", f"[127.0.0.1]:{server.port} {' '.join(words)}\n", "its host key is not the one that is known"),
    ):
        (tmp_path / f"{name}_hosts").write_text(known)
        text = server.config.read_text().replace(f"{server.folder}/known_hosts", str(tmp_path / f"{name}_hosts"))
        before = server.log().count("Accepted publickey")
        with pytest.raises(Unreachable, match=said):
            Connection(configured(tmp_path / name, text, "  StrictHostKeyChecking no\n")).call(there.user)
        assert server.log().count("Accepted publickey") == before


def test_who_waits_asks_for_a_sign_of_life(
    server: sshd.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_session, "ASK_SECONDS", 0.05)
    connection = Connection(configured(tmp_path / "config", server.config.read_text()))
    os.mkfifo(tmp_path / "fifo")
    told: list[dict[str, object]] = []
    waiting = threading.Thread(
        target=lambda: told.append(connection.call(there.run, ["cat", str(tmp_path / "fifo")], 120.0))
    )
    waiting.start()
    signs = {wait_for(lambda: connection._session, "the session")._moved}

    def three() -> bool:
        signs.add(connection._session._moved)  # type: ignore[union-attr]
        return len(signs) > 12  # some are of the call itself

    wait_for(three, "signs of life")
    (tmp_path / "fifo").write_text("over")
    waiting.join(timeout=120)
    assert told[0]["out"] == "over"


def test_a_connection_that_falls_silent_is_given_up(
    server: sshd.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_session, "ASK_SECONDS", 0.05)
    login = configured(tmp_path / "config", server.config.read_text())
    connection = Connection(login)
    assert connection.call(there.user) == ME
    server.freeze()
    try:
        with monkeypatch.context() as impatient:
            impatient.setattr(ssh_session, "SILENT_SECONDS", 0.5)
            with pytest.raises(Unreachable, match="has not answered"):  # more than fits into the pipes on the way
                connection.call(there.write, str(tmp_path / "large"), b"x" * 8_000_000)
        assert not ssh_login.is_open(login), "the dead connection of ours is not used again"
        assert connection.call(there.user) == ME
    finally:
        server.freeze(False)
    assert not (tmp_path / "large").exists()


def test_of_the_users_own_silent_connection_it_is_said_how_to_end_it(
    server: sshd.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_session, "ASK_SECONDS", 0.05)
    shared = f"  ControlMaster auto\n  ControlPersist 60\n  ControlPath {server.folder}/auto-%C\n"
    login = configured(tmp_path / "config", server.config.read_text(), shared)
    assert Connection(login).call(there.user) == ME
    server.freeze()
    try:
        monkeypatch.setattr(ssh_session, "START_SECONDS", 0.5)
        with pytest.raises(Unreachable, match="has not answered") as caught:  # not even a session begins
            Connection(login).call(there.user)
        assert "-O exit" in caught.value.fix and ssh_login.is_open(login), "other things may go over it"
    finally:
        server.freeze(False)


def test_docker_elsewhere_is_refused_before_any_ssh_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's own ssh would hold host keys against whatever the user's configuration lets pass."""
    for host in ("ssh://spark2", "tcp://10.0.0.1:2375"):
        monkeypatch.setenv("DOCKER_HOST", host)
        with pytest.raises(Elsewhere, match="can't be mounted"):
            endpoint(None)
    assert endpoint("unix:///run/docker.sock") == "unix:///run/docker.sock"
