"""Two machines on one: a network namespace each, with a real dockerd and, in the second, a real sshd; two networks
between them, of which one is slow. As two Sparks, only small.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers import docker, sshd
from tests.helpers.cli import LONGEST, ROOT

SLOW_MBIT = 90
_SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_PROGRAMS = {name: shutil.which(name, path=_SEARCH) for name in ("ip", "tc", "nsenter")}
FAST, SLOW = ("fast0", "10.88.1"), ("slow0", "10.88.2")  # interface, network; the same names on both


@dataclass
class Pair:
    """`first` is where commands run; ssh reaches `second` by that name over the slow network."""

    folder: Path
    daemons: tuple[docker.Daemon, docker.Daemon]
    spaces: tuple[str, str]
    server: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        """Of commands on the first host."""
        home = {"HOME": str(self.folder / "home"), "DOCKER_HOST": self.daemons[0].host}
        return {**os.environ, **home, "PYTHONPATH": str(ROOT)}

    @property
    def copies(self) -> Path:
        """Where copies lie on the second host."""
        return self.folder / "copies"

    def inside(self, host: int, *argv: str) -> list[str]:
        """argv that runs there."""
        return [str(_PROGRAMS["ip"]), "netns", "exec", self.spaces[host], *argv]

    def python(self, cwd: Path, *argv: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Python on the first host, which must end with `code`."""
        command = self.inside(0, sys.executable, *argv)
        done = subprocess.run(command, cwd=cwd, env=self.env, capture_output=True, text=True, timeout=LONGEST)
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done

    def nemotron(self, cwd: Path, *argv: str, code: int | None = 0) -> str:
        """stdout and stderr of a command on the first host."""
        done = self.python(cwd, "-m", "nemotron_recipes", *argv, code=code)
        return done.stdout + done.stderr

    def profile(self, **fields: Any) -> dict[str, Any]:
        """Of a profile for both; the threshold lies far above the slow network."""
        own = {"hosts": ["localhost", "second"], "hosts_min_gbps": 0.2, "hosts_folder": str(self.copies)}
        own |= {"ssh_config": str(self.folder / "ssh_config"), "remote_python": sys.executable}
        own |= {"hf_cache": str(self.folder / "hf"), "network": "host", "grace_seconds": 2.0}
        return docker.profile(**{**own, **fields})

    def write_profile(self, folder: Path, **fields: Any) -> None:
        """env.toml with the profile `pair`."""
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.profile(**fields).items()]
        (folder / "env.toml").write_text("\n".join(["[pair]", *lines]) + "\n")

    def containers(self, host: int, run: str = "") -> list[str]:
        """Ids of all containers there, or those of a run."""
        of_run = ("--filter", f"label=nemotron.run={run}") if run else ()
        return self.daemons[host].docker("ps", "--all", "--quiet", *of_run).split()

    def bring_up(self) -> None:
        """The fast network again, of which somebody has taken one end down."""
        for space in self.spaces:
            _ip("-n", space, "link", "set", FAST[0], "up")

    def start_sshd(self) -> None:
        """Returns when it listens."""
        argv = self.inside(1, str(sshd.PROGRAM), "-D", "-e", "-f", str(self.folder / "sshd_config"))
        server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        self.server.append(server)
        assert server.stderr is not None
        said = b""
        for line in server.stderr:
            said += line
            if b"Server listening" in line:
                break
        else:
            raise AssertionError(said.decode())
        # Nobody must wait for a reader.
        subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop_sshd(self) -> None:
        """With all its sessions, as when the machine is gone."""
        for server in self.server:
            with contextlib.suppress(ProcessLookupError):
                server.send_signal(signal.SIGSTOP)  # who has lost a session would at once be given another
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if process.name() == "sshd":
                            process.kill()
            server.wait(60)
        self.server.clear()


def require() -> None:
    """Skip the test where there can't be two machines."""
    docker.require()
    sshd.require()
    missing = [name for name, program in _PROGRAMS.items() if program is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; make test-system installs it")


@contextlib.contextmanager
def pair() -> Iterator[Pair]:
    """Both, with `docker.IMAGE`, until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="pair-"))  # short: sockets lie below it
    spaces = (f"{folder.name}-a", f"{folder.name}-b")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for space in spaces:
            _ip("netns", "add", space)
            stack.callback(_ip, "netns", "del", space)
        _join(spaces)
        daemons = tuple(
            stack.enter_context(docker.daemon(before=("nsenter", f"--net=/run/netns/{space}"))) for space in spaces
        )
        archive = folder / "image.tar"
        daemons[0].docker("save", "--output", str(archive), docker.IMAGE)
        daemons[1].docker("load", "--input", str(archive))
        made = Pair(folder, (daemons[0], daemons[1]), spaces)
        _configure_ssh(made)
        stack.callback(_end_connections, folder)
        made.start_sshd()
        stack.callback(made.stop_sshd)
        yield made


def _join(spaces: Sequence[str]) -> None:
    for name, network in (FAST, SLOW):
        _ip("link", "add", name, "netns", spaces[0], "type", "veth", "peer", "name", name, "netns", spaces[1])
        for number, space in enumerate(spaces, 1):
            _ip("-n", space, "addr", "add", f"{network}.{number}/24", "dev", name)
            _ip("-n", space, "link", "set", name, "up")
    for space in spaces:
        _ip("-n", space, "link", "set", "lo", "up")
        rate = ("tbf", "rate", f"{SLOW_MBIT}mbit", "burst", "32kb", "latency", "400ms")
        _run(str(_PROGRAMS["tc"]), "-n", space, "qdisc", "add", "dev", SLOW[0], "root", *rate)


def _configure_ssh(made: Pair) -> None:
    folder = made.folder
    (folder / "home").mkdir(mode=0o700)
    (folder / "hf").mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    host, user = sshd.key(folder / "host_key"), sshd.key(folder / "user_key")
    (folder / "authorized_keys").write_text(Path(f"{user}.pub").read_text())
    address = f"{SLOW[1]}.2"
    (folder / "sshd_config").write_text(
        f"HostKey {host}\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\nMaxStartups 100\nUseDNS no\n"
        f"ListenAddress {address}\nSetEnv DOCKER_HOST={made.daemons[1].host}\n"
    )
    words = Path(f"{host}.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"{address} {' '.join(words)}\n")
    (folder / "ssh_config").write_text(
        f"Host second\n  HostName {address}\n  IdentityFile {user}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
    )


def _end_connections(folder: Path) -> None:
    """Those that ssh keeps open."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()) and process.pid != os.getpid():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def _ip(*argv: str) -> None:
    _run(str(_PROGRAMS["ip"]), *argv)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
