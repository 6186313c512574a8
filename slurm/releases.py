"""Slurm of other Debian releases than this machine's: unpacked into a folder of its own, run from there.

Nothing is installed and no root is needed: the programs take the loader and the libraries that lie beside them, and a
job that they start runs with what this machine has. Whichever Slurm comes first on the PATH is the test cluster's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemotron_recipes.errors import NemotronError, Problem, UserError
from nemotron_recipes.fsio import write_atomic

PACKAGES = ("slurmctld", "slurmd", "slurmdbd", "slurm-client", "libslurm-dev", "libc6-dev")
# munge, MariaDB and their like stay this machine's: Slurm speaks to them by sockets.
DAEMONS = ("slurmctld", "slurmd", "slurmdbd", "slurmstepd")
COMMANDS = ("sacct", "sacctmgr", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun", "sstat")
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
NOTE = "release.json"


@dataclass(frozen=True)
class Release:
    """A Slurm on this machine. For the installed one all but `version` is empty.

    plugins   the folder of its plugins
    sysroot   where its headers and its C library lie
    stepd     the program that a slurmd starts for each step
    """

    version: str
    plugins: str = ""
    sysroot: str = ""
    stepd: str = ""

    @property
    def number(self) -> tuple[int, ...]:
        """(20, 11) of 20.11.9."""
        return tuple(int(part) for part in self.version.split(".")[:2])


def of_program(slurmctld: str) -> Release:
    """The Slurm that this program belongs to. NemotronError: it does not say its version."""
    note = Path(slurmctld).parent.parent / NOTE
    if note.exists():
        return Release(**json.loads(note.read_text()))
    said = subprocess.run([slurmctld, "-V"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    found = re.search(r"\b(\d\d\.\d\d\.\d+)", said.stdout)
    if not found:
        raise NemotronError(f"{slurmctld} -V does not say a version: {(said.stdout or said.stderr).strip()!r}")
    return Release(found[1])


def fetch(suite: str, folder: Path, mirror: str = "", keys: str = "") -> Release:
    """Unpack the Slurm of a Debian suite (bullseye, trixie, sid, ...) into `folder`, which must not exist or be empty.

    mirror  "": where this machine gets Debian from; else a URL, of Debian or a distribution made of it, with the file
            of its `keys`
    UserError: apt is not here; NemotronError: the suite can't be had, or its Slurm does not run.
    """
    missing = [name for name in ("apt-get", "dpkg-deb", "patchelf") if not shutil.which(name)]
    signed = Path(keys or KEYS)
    if missing or not signed.exists():
        what = f"not here: {', '.join(missing) or signed}"
        raise UserError(Problem(what, fix="do this on Debian: apt-get install patchelf debian-archive-keyring"))
    if folder.exists() and any(folder.iterdir()):
        raise UserError(Problem(f"{folder} is not an empty folder", fix="name another, or remove it"))
    apt = folder / "apt"
    parts = "main universe" if "ubuntu" in mirror else "main"
    for needed in ("state/lists/partial", "cache/archives/partial", "etc"):
        (apt / needed).mkdir(parents=True)
    (apt / "status").touch()  # nothing is installed there: so apt names every package that is needed
    (apt / "etc" / "sources.list").write_text(f"deb [signed-by={signed}] {mirror or _mirror()} {suite} {parts}\n")
    options = _options(apt)
    _run(["apt-get", *options, "update", "-q"])
    _run(["apt-get", *options, "install", "-q", "-y", "--download-only", "--no-install-recommends", *PACKAGES])
    root = folder / "root"
    root.mkdir()
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(root)])
    shutil.rmtree(apt)
    release = _made_to_run(folder, root)
    write_atomic(folder / NOTE, json.dumps(asdict(release), indent=1) + "\n")
    return release


def _mirror() -> str:
    """Where this machine gets Debian from."""
    said = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Component: main"])
    found = [line for line in said.split() if line.rstrip("/").endswith("/debian")]
    if not found:
        raise UserError(Problem("apt names no mirror of Debian", "/etc/apt", "add one"))
    return found[0]


def _options(apt: Path) -> list[str]:
    user = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []  # the folder may be closed to user _apt
    return [
        *user,
        *("-o", f"Dir::State={apt}/state", "-o", f"Dir::State::status={apt}/status"),
        *("-o", f"Dir::Cache={apt}/cache", "-o", f"Dir::Etc::sourcelist={apt}/etc/sources.list"),
        *("-o", "Dir::Etc::sourceparts=-", "-o", "Dir::Etc::preferencesparts=-", "-o", "Acquire::Languages=none"),
    ]


def _made_to_run(folder: Path, root: Path) -> Release:
    """`folder`/bin with Slurm's programs, each of which finds its loader and libraries below `root` by itself."""
    loader = _one(root, "lib*/ld-linux*.so.*", "usr/lib*/ld-linux*.so.*", "lib/*/ld-linux*.so.*")
    plugins = _one(root, "usr/lib/*/slurm-wlm")
    libraries = [plugins, plugins.parent, root / "lib" / plugins.parent.name]
    libraries += [path.parent for path in root.glob("usr/lib/*/*/lib*.so.*")]  # mariadb's and their like
    path = ":".join(dict.fromkeys(str(each) for each in libraries))
    own = [each for each in plugins.iterdir() if ".so" in each.suffixes and not each.is_symlink()]
    _run(["patchelf", "--remove-rpath", *map(str, own)])  # it would hide that of the program
    (folder / "bin").mkdir()
    for name in (*DAEMONS, *COMMANDS):
        program = _one(root, *(f"usr/{place}/{name}{end}" for place in ("sbin", "bin") for end in ("", "-wlm")))
        made = folder / "bin" / name  # by that name: Slurm's programs look at it
        shutil.copy(program, made)
        _run(["patchelf", "--set-interpreter", str(loader), "--force-rpath", "--set-rpath", path, str(made)])
    version = of_program(str(folder / "bin" / "slurmctld")).version
    return Release(version, str(plugins), str(root), str(folder / "bin" / "slurmstepd"))


def _one(root: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if path.is_symlink() and os.readlink(path).startswith("/"):  # to what it would be, were it installed
                return root / os.readlink(path)[1:]
            return path
    raise NemotronError(f"the packages hold no {' or '.join(patterns)}")


def _run(argv: Sequence[str]) -> str:
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environ, check=False)
    if done.returncode:
        tail = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        raise NemotronError(f"{' '.join(argv[:1])} {argv[-1]} ended with {done.returncode}:\n{tail}")
    return done.stdout
