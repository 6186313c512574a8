"""Why a container could not be made: what Slurm, Pyxis and enroot print about it, and what to do. Pure.

Words of Pyxis 0.12 to 0.24 (pyxis_slurmstepd.c), and of enroot 3 and 4 (src/common.sh, src/docker.sh,
bin/enroot-mount.c).
"""

from __future__ import annotations

import re

# (what is printed, what it means, what to do); the first that is found counts. Groups fill both.
_TROUBLE = (
    (
        r"srun: unrecognized option '(--container-image)(?:=.*)?'",  # the first that is given
        "this Slurm does not know {0}: Pyxis is not there",
        "container = false runs on bare metal (setup loads what is needed); else ask the site for Pyxis",
    ),
    (
        r"srun: unrecognized option '--((?:no-)?container-\S+?)(?:=.*)?'",
        "this Slurm's Pyxis does not know --{0}",
        'remove = ["{0}"]',
    ),
    (
        r"source path does not exist: (.+)",
        "there is no {0} to mount",
        "make it, or name another under mounts; all nodes must see it",
    ),
    (
        r"failed to mount: (.+?) at (\S+): No such file or directory",
        "there is no {0} to mount",
        "make it, or name another under mounts; all nodes must see it",
    ),
    (
        r"failed to mount: (.+?) at (.+?): (.+)",
        "{0} can't be mounted: {2}",
        "look at its rights and at the options under mounts",
    ),
    (
        r"pyxis:\s+\[ERROR\] No such file or directory: (.+)",
        "there is no image {0}",
        "make it there (enroot import -o FILE docker://IMAGE), or name another: container_image; all nodes must see it",
    ),
    (
        r"pyxis:\s+\[ERROR\] Invalid image format: (.+)",
        "{0} is no whole squashfs image",
        "make it anew: enroot import -o FILE docker://IMAGE",
    ),
    (
        r"pyxis:\s+\[ERROR\] Invalid image reference: (.+)",
        "enroot can't read the image's name {0}",
        "container_image: /PATH/IMAGE.sqsh or REGISTRY/IMAGE:TAG",
    ),
    (
        r"(?s)failed to import docker image(?:: ([^\n]+))?.*?\[ERROR\][^\n]*?(40[13][^\n]*)",
        "the registry refuses the image {0}: {1}",
        "its key belongs into ~/.config/enroot/.credentials on the nodes; or import it once to a .sqsh file",
    ),
    (
        r"(?s)failed to import docker image(?:: ([^\n]+))?.*?\[ERROR\]\s*([^\n]*)",
        "the image {0} can't be fetched: {1}",
        "look at its name and tag, and whether nodes reach the registry; or import it once to a .sqsh file",
    ),
    (
        r"failed to import docker image(?:: (.+))?",
        "the image {0} can't be fetched",
        "look at its name and tag, and whether nodes reach the registry; or import it once to a .sqsh file",
    ),
    (
        r"pyxis: couldn't chdir to (.+?): (.+)",
        "the container has no folder {0} to start in: {1}",
        "container_workdir, and mounts",
    ),
    (
        r'a container with name "?(.+?)"? does not exist',
        "no container {0} is kept on the node",
        "set container_image as well",
    ),
    (
        r"error: execve\(\): (\S+): No such file or directory",
        "there is no {0} to start",
        "python = ... names the interpreter",
    ),
    (
        r"pyxis: (?:couldn't start container|container start failed.*|failed to create container filesystem.*)",
        "Pyxis can't make the container",
        "its own words follow",
    ),
)


def container_trouble(text: str) -> tuple[str, str] | None:
    """(what is wrong, what to do) as the logs of a job step say it; None where they speak of no container."""
    for pattern, what, fix in _TROUBLE:
        found = re.search(pattern, text)
        if found:
            groups = [group or "" for group in found.groups()]
            return re.sub(r" +(?= |:|$)", "", what.format(*groups)), fix.format(*groups)
    return None


def nodes_of(text: str) -> list[str]:
    """The nodes where it happened: those that slurmstepd names, where it does; else those whose tasks failed."""
    named = re.findall(r"slurmstepd-(\S+): error: (?:pyxis|execve)", text)
    named = named or re.findall(r"srun: error: (\S+): tasks? [\d,-]+: Exited with exit code (?!143)", text)
    return list(dict.fromkeys(named))
