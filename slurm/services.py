"""The daemons of a test cluster: the command that each runs, and the Debian package that brings it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from nemotron_recipes.errors import Problem
from slurm.spec import Spec

# Debian puts daemons where a normal user's PATH does not reach.
SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
ACCOUNTING_PACKAGES = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",  # mariadb-install-db calls it
}


@dataclass(frozen=True)
class Service:
    """A daemon. It runs in the foreground, its output in log/NAME.out; `node` says which node's name it bears.

    `once`: no daemon but a command whose end the next one waits for.
    """

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    node: str = ""
    once: bool = False


def missing_packages(accounting: bool) -> list[Problem]:
    """One problem for all programs that are not installed."""
    needed = PACKAGES | (ACCOUNTING_PACKAGES if accounting else {})
    absent = [program for program in needed if not shutil.which(program, path=SEARCH)]
    if not absent:
        return []
    packages = sorted({needed[program] for program in absent})
    what = f"not installed: {', '.join(absent)} (Debian: {', '.join(packages)})"
    fix = "`make test-system` as root"
    if not set(absent) & set(PACKAGES):
        fix += ", or do without accounting: --no-accounting"
    return [Problem(what, fix=fix)]


def program(name: str) -> str:
    """Its full path; `missing_packages` has said that it is there."""
    return shutil.which(name, path=SEARCH) or name


def services(spec: Spec) -> dict[str, Service]:
    """By name, in the order in which they start."""
    files = spec.files
    conf = str(files.slurm_conf)
    # Nothing of the caller's own Slurm may reach the daemons.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH_", "MYSQL"))}
    env |= {"PATH": SEARCH, "SLURM_CONF": conf}
    found = [
        Service(
            "munged",
            (
                program("munged"),
                "--foreground",
                "--force",  # a folder that others can't reach is a warning: that is how a private cluster is meant
                f"--socket={files.munge_socket}",
                f"--key-file={files.munge_key}",
                f"--seed-file={files.munge_key.parent}/munge.seed",
                f"--pid-file={files.run}/munged.pid",
                f"--log-file={files.log}/munged.log",
            ),
            env,
        )
    ]
    if spec.accounting:
        found += _accounting(spec, env)
    found.append(Service("slurmctld", (program("slurmctld"), "-D", "-f", conf), env))
    stepd = ("-d", spec.release.stepd) if spec.release.stepd else ()
    for name in spec.node_names:
        argv = (program("slurmd"), "-D", "-N", name, "-f", conf, *stepd)
        found.append(Service(name, argv, env, node=name))
    return {service.name: service for service in found}


def _accounting(spec: Spec, env: dict[str, str]) -> list[Service]:
    files = spec.files
    options = (
        "--no-defaults",
        f"--user={spec.user}",
        f"--datadir={files.database}",
        # Nothing needs to outlive the machine: no fsync, a small log.
        "--innodb-log-file-size=4M",
        "--innodb-flush-method=nosync",
        "--debug-no-sync",
    )
    setup = (  # the system tables, and the cluster's user as the one who may do everything
        program("mariadb-install-db"),
        *options,
        "--auth-root-authentication-method=socket",
        f"--auth-root-socket-user={spec.user}",
        "--skip-test-db",
        "--skip-name-resolve",
    )
    mariadbd = (
        program("mariadbd"),
        *options,
        f"--socket={files.database_socket}",
        "--skip-networking",
        f"--pid-file={files.run}/mariadbd.pid",
        "--innodb-buffer-pool-size=64M",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-lock-wait-timeout=900",
    )
    return [
        Service("mariadb-install-db", setup, env, once=True),
        Service("mariadbd", mariadbd, env),
        # slurmdbd has no parameter for the socket; MariaDB's client library reads this variable.
        Service("slurmdbd", (program("slurmdbd"), "-D"), env | {"MYSQL_UNIX_PORT": str(files.database_socket)}),
    ]
