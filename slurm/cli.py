"""The command line of `slurm/testcluster`. Exit codes: 0 done, 1 it did not work, 2 the request is wrong."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from nemotron_recipes.errors import Cancelled, NemotronError, Problem, UserError
from slurm import clients, cluster, keeper, releases
from slurm.spec import Spec, load

EPILOG = """\
example:
  slurm/testcluster up --nodes 2 --gpus-per-node 2
  eval "$(slurm/testcluster env)"
  srun --nodes=2 --ntasks-per-node=2 hostname
  slurm/testcluster down
"""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments, Path(os.path.abspath(arguments.dir or cluster.default_folder())))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return Cancelled.exit_code
    except BrokenPipeError:  # of our own output: `... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except NemotronError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _up(arguments: argparse.Namespace, folder: Path) -> None:
    if arguments.while_pid is not None:
        _check_pid(arguments.while_pid)
    spec = cluster.plan(
        folder,
        nodes=arguments.nodes,
        cpus=arguments.cpus_per_node,
        gpus=arguments.gpus_per_node,
        accounting=not arguments.no_accounting,
        accounts=tuple(arguments.account),
        namespaces=not arguments.no_namespaces,
        standin=arguments.pyxis_standin,
        settings=dict(arguments.set),
    )
    began = time.monotonic()
    cluster.up(spec, arguments.while_pid)
    what = f"{spec.nodes} nodes, {'with' if spec.accounting else 'without'} accounting"
    print(f"up after {time.monotonic() - began:.1f} s: {what}, in {folder}")
    where = f" --dir {shlex.quote(str(folder))}" if arguments.dir else ""
    print(f'use it:   eval "$(slurm/testcluster env{where})"')
    print(f"end it:   slurm/testcluster down{where}")


def _down(arguments: argparse.Namespace, folder: Path) -> None:
    if not cluster.down(folder):
        print(f"no test cluster in {folder}")


def _fetch(arguments: argparse.Namespace, folder: Path) -> None:
    into = Path(os.path.abspath(arguments.folder))
    release = releases.fetch(arguments.suite, into, arguments.mirror, arguments.keys)
    print(f"Slurm {release.version} of {arguments.suite} is in {into}")
    print(f'a cluster of it:   PATH={shlex.quote(str(into / "bin"))}:"$PATH" slurm/testcluster up')


def _status(arguments: argparse.Namespace, folder: Path) -> None:
    spec = load(folder)
    rows = cluster.status(spec)
    print(f"folder  {folder}\nlogs    {spec.files.log}")
    print(f"{'daemon':<12}{'pid':>8}{'processes':>11}  slurm says")
    for name, row in rows.items():
        print(f"{name:<12}{row['pid'] or 'dead':>8}{row['processes']:>11}  {row.get('slurm', '')}".rstrip())


def _env(arguments: argparse.Namespace, folder: Path) -> None:
    for key, value in clients.environment(load(folder)).items():
        print(f"export {key}={shlex.quote(value)}")


def _kill_node(arguments: argparse.Namespace, folder: Path) -> None:
    cluster.kill(folder, cluster.node_name(load(folder), arguments.name), arguments.noticed)


def _start_node(arguments: argparse.Namespace, folder: Path) -> None:
    cluster.start(folder, cluster.node_name(load(folder), arguments.name))


def _kill_daemon(arguments: argparse.Namespace, folder: Path) -> None:
    cluster.kill(folder, _daemon_name(load(folder), arguments.name))


def _start_daemon(arguments: argparse.Namespace, folder: Path) -> None:
    cluster.start(folder, _daemon_name(load(folder), arguments.name))


def _keep(arguments: argparse.Namespace, folder: Path) -> None:
    keeper.keep(load(folder), arguments.while_pid)


def _daemon_name(spec: Spec, name: str) -> str:
    daemons = [*cluster.status(spec)]
    if name not in daemons:
        raise UserError(Problem(f"no daemon is called {name!r}", fix=f"valid: {', '.join(daemons)}"))
    return name


def _check_pid(pid: int) -> None:
    try:
        os.close(os.pidfd_open(pid))
    except OSError as error:
        raise UserError(Problem(f"--while {pid}: {error.strerror}", fix="give the pid of a living process")) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slurm/testcluster",
        description="A private multi-node Slurm on this machine, out of Debian's packages. See docs/testcluster.md.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dir", help="the cluster's folder; several clusters have several (default: one per user)")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, parents=[common], description=text, help=text)
        found.set_defaults(run=run)
        return found

    up = command("up", _up, "start a cluster; return when every node is idle")
    up.add_argument("--nodes", type=_whole(1, 250), default=4, help="default 4")
    up.add_argument("--cpus-per-node", type=_whole(1, 4096), default=32, help="as Slurm counts them (default 32)")
    up.add_argument("--gpus-per-node", type=_whole(0, 64), default=0, help="that Slurm allots; none exists (default 0)")
    up.add_argument("--no-accounting", action="store_true", help="no slurmdbd and no database: sacct fails")
    up.add_argument("--account", action="append", default=[], help="make this account and refuse others; repeatable")
    up.add_argument("--no-namespaces", action="store_true", help="nodes share this machine's host name and address")
    up.add_argument("--pyxis-standin", action="store_true", help="take Pyxis's options; it is not Pyxis")
    up.add_argument("--set", action="append", default=[], type=_setting, metavar="KEY=VALUE", help="in slurm.conf")
    up.add_argument("--while", dest="while_pid", type=int, metavar="PID", help="down by itself when that process ends")
    command("down", _down, "end every process of the cluster and delete its folder")
    command("status", _status, "daemons and nodes, as the machine and as Slurm sees them")
    command("env", _env, "shell lines after which sbatch, squeue, sacct, ... speak to the cluster")
    text = "a power failure: SIGKILL to slurmd, job steps and tasks of a node at once"
    kill_node = command("kill-node", _kill_node, text)
    kill_node.add_argument("name", metavar="N", help="its number or name")
    kill_node.add_argument("--noticed", action="store_true", help="tell slurmctld too, which else takes some 20 s")
    for name, run, text in (
        ("start-node", _start_node, "bring a killed node back"),
        ("kill-daemon", _kill_daemon, "SIGKILL to slurmctld, slurmdbd, mariadbd or munged"),
        ("start-daemon", _start_daemon, "bring a killed daemon back"),
    ):
        command(name, run, text).add_argument("name", metavar="N" if "node" in name else "NAME")
    text = "unpack the Slurm of another Debian release into a folder; nothing is installed"
    fetch = commands.add_parser("fetch", description=text, help=text)
    fetch.set_defaults(run=_fetch, dir=None)
    fetch.add_argument("suite", metavar="SUITE", help="bullseye, trixie, sid, ...")
    fetch.add_argument("folder", metavar="FOLDER", help="a new one; FOLDER/bin goes before the PATH")
    fetch.add_argument("--mirror", default="", metavar="URL", help="of Debian or Ubuntu (default: this machine's own)")
    fetch.add_argument("--keys", default="", metavar="FILE", help="the keyring that signs it (default: Debian's)")
    keep = commands.add_parser("keep", parents=[common])  # no help: `up` calls it, and it is not listed
    keep.set_defaults(run=_keep)
    keep.add_argument("--while", dest="while_pid", type=int)
    return parser


def _whole(least: int, most: int) -> type[int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return number  # type: ignore[return-value]


def _setting(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier() or "\n" in value:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value
