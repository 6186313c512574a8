"""What a cluster needs to take Pyxis's options: pyxis_standin.c, built against Slurm's own header. It is not Pyxis."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from nemotron_recipes.errors import NemotronError, Problem
from slurm.services import SEARCH, program
from slurm.spec import Spec

SOURCE = Path(__file__).with_name("pyxis_standin.c")
HEADER = Path("/usr/include/slurm/spank.h")
PACKAGES = {"cc": "gcc", "mksquashfs": "squashfs-tools", "unsquashfs": "squashfs-tools"}


def missing() -> list[Problem]:
    """One problem for all that is not installed."""
    absent = [name for name in PACKAGES if not shutil.which(name, path=SEARCH)]
    packages = {PACKAGES[name] for name in absent}
    for header, package in ((HEADER, "libslurm-dev"), (Path("/usr/include/stdlib.h"), "libc6-dev")):
        if not header.exists():
            absent.append(str(header))
            packages.add(package)
    if not absent:
        return []
    what = f"not installed: {', '.join(absent)} (Debian: {', '.join(sorted(packages))})"
    return [Problem(what, fix="`make test-system` as root, or do without --pyxis-standin")]


def build(spec: Spec) -> None:
    """The plugin and the folders that it works in."""
    files = spec.files
    for folder, mode in ((files.standin.parent, 0o755), (files.registry, 0o755), (files.containers, 0o1777)):
        folder.mkdir()
        folder.chmod(mode)  # whatever the umask
    sysroot = [f"--sysroot={spec.release.sysroot}"] if spec.release.sysroot else []
    argv = [program("cc"), *sysroot, "-shared", "-fPIC", "-O1", "-o", str(files.standin), str(SOURCE)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NemotronError(f"{SOURCE.name} can't be built:\n{done.stderr.strip()}")
