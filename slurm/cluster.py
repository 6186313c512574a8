"""What can be done with a test cluster: bring it up, take it down, kill and start its parts, look at it."""

from __future__ import annotations

import os
import platform
import pwd
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import NemotronError, Problem, UserError
from slurm import clients, conf, isolation, keeper, proctree, pyxis, releases
from slurm.services import missing_packages, program, services
from slurm.spec import Files, Spec, load, problems_of_folder

# Below the kernel's range for outgoing connections, so that none of those takes a port between choice and use.
PORTS = range(10000, 32000)
READY_SECONDS = 60.0
NODE_MEMORY_MB = 64000
LOG_LINES = 15
PROGRAM = Path(__file__).with_name("testcluster")


def default_folder() -> Path:
    """The user's own: $XDG_STATE_HOME/nemotron-recipes/testcluster."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "nemotron-recipes" / "testcluster"


def plan(
    folder: Path,
    nodes: int = 4,
    cpus: int = 32,
    gpus: int = 0,
    accounting: bool = True,
    accounts: tuple[str, ...] = (),
    namespaces: bool = True,
    standin: bool = False,
    settings: dict[str, str] | None = None,
) -> Spec:
    """A cluster that can be made here; UserError with every reason why not. Writes nothing."""
    problems = problems_of_folder(folder) + missing_packages(accounting) + (pyxis.missing() if standin else [])
    if accounts and not accounting:
        problems.append(Problem("accounts need accounting", fix="leave out --account or --no-accounting"))
    if platform.system() != "Linux":
        problems.append(Problem("the test cluster needs Linux", fix="use a Linux machine or container"))
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        what = f"user id {os.geteuid()} has no name, and Slurm knows users by name"
        problems.append(Problem(what, fix="run as a user who is in /etc/passwd"))
    if problems:
        raise UserError(*problems)
    return Spec(
        folder=str(folder),
        user=user,
        host=socket.gethostname().partition(".")[0],
        nodes=nodes,
        cpus=cpus,
        memory_mb=NODE_MEMORY_MB,
        gpus=gpus,
        accounting=accounting,
        accounts=accounts,
        isolated=namespaces,
        standin=standin,
        subnet=f"127.{random.randint(1, 254)}.{random.randint(1, 254)}",
        ports=free_ports(nodes + 2),
        settings=settings or {},
        release=releases.of_program(program("slurmctld")),
    )


def up(spec: Spec, while_pid: int | None = None) -> Spec:
    """Make the folder, start everything, return when every node is idle. After an error or Ctrl-C nothing is left.

    The returned spec says whether nodes have their own host names here (`isolated`).
    """
    _claim(spec)
    try:
        spec = _write(spec)
        _start_keeper(spec, while_pid)
        _bring_up(spec)
    except BaseException:
        down(Path(spec.folder))
        raise
    return spec


def down(folder: Path) -> bool:
    """End all processes of the cluster and delete its folder; False when no cluster is there."""
    if not Files(folder).spec.exists():
        return False
    try:
        _wait_gone(keeper.ask(Files(folder).control_socket, {"do": "down"})["keeper"])
    except PermissionError:
        raise UserError(Problem(f"the cluster in {folder} is another user's", fix="be that user")) from None
    except (ConnectionError, FileNotFoundError):  # no keeper: the guards have ended what it had started
        if left := proctree.naming(str(folder)):
            lines = "".join(f"\n    {pid} {line}" for pid, line in left.items())
            raise NemotronError(f"the cluster's keeper is gone and processes are left:{lines}") from None
        shutil.rmtree(folder)
    except RuntimeError as error:
        raise NemotronError(str(error)) from None
    return True


def kill(folder: Path, name: str, noticed: bool = False) -> None:
    """SIGKILL to that node or daemon and to all that it runs, at once; returns when they are dead.

    slurmctld finds out by itself, later; `noticed` (of a node): it is told now.
    """
    spec = load(folder)
    _ask(spec, "kill", name)
    if noticed:
        done = clients.run(spec, "scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")
        if done.returncode:
            raise NemotronError(f"{name} is dead, but slurmctld could not be told: {done.stderr.strip()}")


def start(folder: Path, name: str) -> None:
    """Bring a killed node or daemon back; returns when it does its work. Nothing happens to one that lives."""
    spec = load(folder)
    _ask(spec, "start", name)
    _wait(spec, name, _ready(spec, name))


def node_name(spec: Spec, text: str) -> str:
    """`2` and `node2` are both node2; UserError for a node that is not there."""
    name = f"node{text}" if text.isdecimal() else text
    if name not in spec.node_names:
        raise UserError(Problem(f"no node is called {text!r}", fix=f"valid: {', '.join(spec.node_names)}"))
    return name


def status(spec: Spec) -> dict[str, dict[str, Any]]:
    """Per daemon its `pid` (0: dead) and `processes`; of nodes also `slurm`, the state that slurmctld gives."""
    found = {name: row for name, row in _ask(spec, "list").items() if not services(spec)[name].once}
    states = clients.node_states(spec)
    for name in spec.node_names:
        found[name]["slurm"] = states.get(name, "unknown")
    return found


def free_ports(count: int) -> tuple[int, ...]:
    """TCP ports that nothing is bound to, all different."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return tuple(found)
    raise NemotronError(f"fewer than {count} free ports between {PORTS.start} and {PORTS.stop}")


def _claim(spec: Spec) -> None:
    """Make the folders, once: of two who try, the second gets a UserError and touches nothing."""
    try:
        spec.files.make()
    except FileExistsError:
        raise UserError(Problem(f"somebody else makes a cluster in {spec.folder}", fix="give another --dir")) from None
    except OSError as error:
        raise UserError(Problem(f"{spec.folder}: {error.strerror}", fix="give a --dir that you may write")) from None
    spec.save()


def _write(spec: Spec) -> Spec:
    files = spec.files
    _write_shared(files.hosts, conf.hosts(spec))
    if spec.isolated and (refused := isolation.refusal(files.hosts)):
        spec = replace(spec, isolated=False)
        print(f"note: nodes share this machine's host name: namespaces are refused here ({refused})", file=sys.stderr)
    _write_shared(files.slurm_conf, conf.slurm_conf(spec))
    _write_shared(files.gres_conf, conf.gres_conf(spec))
    _write_shared(files.cgroup_conf, conf.cgroup_conf(spec))
    _write_shared(files.plugstack_conf, conf.plugstack_conf(spec))
    if spec.standin:
        pyxis.build(spec)
    if spec.accounting:
        files.slurmdbd_conf.touch(mode=0o600)  # slurmdbd refuses one that others can read
        files.slurmdbd_conf.write_text(conf.slurmdbd_conf(spec))
    files.munge_key.touch(mode=0o600)
    files.munge_key.write_bytes(secrets.token_bytes(128))
    for number in range(spec.gpus):
        (files.devices / f"gpu{number}").symlink_to("/dev/null")
    spec.save()
    return spec


def _write_shared(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)  # whatever the umask: other users' jobs read it


def _start_keeper(spec: Spec, while_pid: int | None) -> None:
    argv = [sys.executable, str(PROGRAM), "keep", "--dir", spec.folder]
    if while_pid is not None:
        argv += ["--while", str(while_pid)]
    with open(spec.files.log / "keeper.out", "ab") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        if process.poll() is not None:
            raise NemotronError(f"the keeper ended at once\n{_log_tail(spec, 'keeper')}")
        try:
            keeper.ask(spec.files.control_socket, {"do": "list"})
        except (ConnectionError, FileNotFoundError):
            return False
        return True

    _until(answers, spec, "keeper")


def _bring_up(spec: Spec) -> None:
    _start_one(spec, "munged")
    if spec.accounting:
        _run_once(spec, "mariadb-install-db")
        _start_one(spec, "mariadbd")
        _start_one(spec, "slurmdbd")
        if spec.accounts:  # which belong to a cluster; without any, slurmctld makes the cluster known by itself
            clients.sacctmgr(spec, "add", "cluster", spec.name)
        for account in spec.accounts:
            clients.sacctmgr(spec, "add", "account", account)
            clients.sacctmgr(spec, "add", "user", spec.user, f"account={account}")
    _start_one(spec, "slurmctld")
    for name in spec.node_names:
        _ask(spec, "start", name)
    for name in spec.node_names:
        _wait(spec, name, _ready(spec, name))


def _run_once(spec: Spec, name: str) -> None:
    _ask(spec, "start", name)
    _until(lambda: _ask(spec, "list")[name]["exit_code"] is not None, spec, name)
    if code := _ask(spec, "list")[name]["exit_code"]:
        raise NemotronError(f"{name} failed with exit code {code}\n{_log_tail(spec, name)}")


def _start_one(spec: Spec, name: str) -> None:
    _ask(spec, "start", name)
    _wait(spec, name, _ready(spec, name))


def _ready(spec: Spec, name: str) -> Callable[[], bool]:
    """A question whose answer is true once that daemon serves."""
    files = spec.files
    if name == "munged":
        return lambda: clients.accepts(str(files.munge_socket))
    if name == "mariadbd":
        return lambda: clients.accepts(str(files.database_socket))
    if name == "slurmdbd":
        return lambda: clients.accepts(spec.ports[conf.SLURMDBD_PORT])
    if name == "slurmctld":
        return lambda: _controls(spec)
    return lambda: clients.node_states(spec).get(name, "") in ("idle", "mixed", "allocated", "completing")


def _controls(spec: Spec) -> bool:
    """Whether slurmctld answers and, after its restart, has heard from every node that lives."""
    if clients.run(spec, "scontrol", "ping").returncode:
        return False
    rows, states = _ask(spec, "list"), clients.node_states(spec)
    return all(states.get(name, "unknown") != "unknown" for name in spec.node_names if rows[name]["pid"])


def _wait(spec: Spec, name: str, ready: Callable[[], bool]) -> None:
    def lives_and_serves() -> bool:
        if not _ask(spec, "list")[name]["pid"]:
            raise NemotronError(f"{name} ended at once\n{_log_tail(spec, name)}")
        return ready()

    _until(lives_and_serves, spec, name)


def _until(done: Callable[[], bool], spec: Spec, name: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise NemotronError(f"{name} is not ready after {READY_SECONDS:g} s\n{_log_tail(spec, name)}")
        time.sleep(0.02)


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while proctree.state(pid) not in proctree.GONE:
        if time.monotonic() > deadline:
            raise NemotronError(f"the keeper, process {pid}, has ended the cluster and is still there")
        time.sleep(0.01)


def _ask(spec: Spec, do: str, name: str = "") -> dict[str, Any]:
    try:
        return keeper.ask(spec.files.control_socket, {"do": do, "name": name})
    except (ConnectionError, FileNotFoundError):
        what = f"the keeper of the cluster in {spec.folder} is gone, and with it the cluster"
        raise UserError(Problem(what, fix=f"`slurm/testcluster down --dir {spec.folder}`, then up again")) from None
    except PermissionError:
        raise UserError(Problem(f"the cluster in {spec.folder} is another user's", fix="be that user")) from None
    except RuntimeError as error:
        raise NemotronError(str(error)) from None


def _log_tail(spec: Spec, name: str) -> str:
    lines = []
    for path in (spec.files.log / f"{name}.out", spec.files.log / f"{name}.log"):
        if path.exists():
            lines += path.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join(f"    {line}" for line in dict.fromkeys(lines)) or "    (it wrote nothing)"
