"""What a test cluster is, and where its files lie. One JSON file in its folder holds all of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import write_atomic
from slurm.releases import Release

# A path of a unix socket holds 107 bytes; the longest below a cluster's folder is a job step's,
# spool/node999/node999_4294967295.4294967295.4294967295.
SOCKET_PATH_BYTES = 107
LONGEST_SOCKET = len("/spool/node999/node999_4294967295.4294967295.0")


@dataclass(frozen=True)
class Files:
    """The files of the cluster in `folder`."""

    folder: Path

    @property
    def spec(self) -> Path:
        return self.folder / "cluster.json"

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def gres_conf(self) -> Path:
        return self.folder / "etc" / "gres.conf"

    @property
    def plugstack_conf(self) -> Path:
        return self.folder / "etc" / "plugstack.conf"  # beside slurm.conf, where Slurm looks for it

    @property
    def slurmdbd_conf(self) -> Path:
        return self.folder / "etc" / "slurmdbd.conf"

    @property
    def cgroup_conf(self) -> Path:
        return self.folder / "etc" / "cgroup.conf"

    @property
    def hosts(self) -> Path:
        return self.folder / "etc" / "hosts"

    @property
    def munge_key(self) -> Path:
        return self.folder / "private" / "munge.key"

    @property
    def database(self) -> Path:
        return self.folder / "private" / "db"

    @property
    def database_socket(self) -> Path:
        return self.folder / "private" / "db.sock"

    @property
    def control_socket(self) -> Path:
        return self.folder / "private" / "keeper.sock"

    @property
    def munge_socket(self) -> Path:
        return self.folder / "run" / "munge.sock"

    @property
    def standin(self) -> Path:
        """The plugin that stands in for Pyxis."""
        return self.folder / "lib" / "pyxis_standin.so"

    @property
    def registry(self) -> Path:
        """Images that the stand-in takes for those of registries, by the name that `enroot import` would give them."""
        return self.folder / "registry"

    @property
    def containers(self) -> Path:
        """Where the stand-in unpacks images, for whoever runs a job."""
        return self.folder / "containers"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def spool(self) -> Path:
        return self.folder / "spool"

    @property
    def devices(self) -> Path:
        return self.folder / "dev"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def make(self) -> None:
        """The folders; FileExistsError when somebody has made them.

        Other users' jobs read the configuration and speak to munge, and that is all they may.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for own in (self.munge_key.parent, self.state, self.log):
            own.mkdir(mode=0o700)
        for shared in (self.slurm_conf.parent, self.run, self.spool, self.devices):
            shared.mkdir()
            shared.chmod(0o755)  # whatever the umask


@dataclass(frozen=True)
class Spec:
    """A cluster. `ports` are free TCP ports: slurmctld's, slurmdbd's, then one per node."""

    folder: str
    user: str
    host: str
    nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    accounting: bool
    accounts: tuple[str, ...]  # accounts that exist and must be named; none: any will do
    isolated: bool  # every node has a host name and an address of its own
    subnet: str  # the first three numbers of the nodes' loopback addresses
    ports: tuple[int, ...]
    release: Release  # which Slurm it is
    standin: bool = False  # takes Pyxis's options
    settings: dict[str, str] = field(default_factory=dict)  # slurm.conf parameters that replace ours

    @property
    def name(self) -> str:
        return "testcluster"

    @property
    def files(self) -> Files:
        return Files(Path(self.folder))

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"node{number}" for number in range(1, self.nodes + 1))

    def node_address(self, number: int) -> str:
        """Of the node with that number, counted from 1. All of 127/8 is this machine: no interface is needed."""
        return f"{self.subnet}.{number}" if self.isolated else "127.0.0.1"

    def save(self) -> None:
        write_atomic(self.files.spec, json.dumps(asdict(self), indent=1) + "\n")


def load(folder: Path) -> Spec:
    """The cluster in `folder`; UserError when there is none."""
    try:
        values = json.loads(Files(folder).spec.read_text())
    except FileNotFoundError:
        raise UserError(
            Problem(f"no test cluster in {folder}", fix="`slurm/testcluster up`, or name its folder by --dir")
        ) from None
    kept = {"accounts": tuple(values["accounts"]), "ports": tuple(values["ports"])}
    return Spec(**{**values, **kept, "release": Release(**values["release"])})


def problems_of_folder(folder: Path) -> list[Problem]:
    """Why no cluster can be made in `folder`."""
    if Files(folder).spec.exists():
        return [
            Problem(
                f"a test cluster is already in {folder}",
                fix=f"use it, or `slurm/testcluster down --dir {folder}`, or give another --dir",
            )
        ]
    found = []
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found.append(Problem(f"{folder} is not an empty folder", fix="give --dir a folder of its own: down deletes it"))
    spare = SOCKET_PATH_BYTES - LONGEST_SOCKET
    if (length := len(bytes(str(folder), "utf-8", "surrogateescape"))) > spare:
        what = f"the path {folder} has {length} bytes; {spare} are the most, as Slurm's sockets lie below it"
        found.append(Problem(what, fix="give a shorter --dir"))
    if any(character.isspace() or character in "#=,\"'\\[]%" for character in str(folder)):
        found.append(Problem(f"{folder!s} has a character that slurm.conf can't hold in a path", fix="another --dir"))
    return found
