"""Why a container could not be made: what Slurm, Pyxis, enroot and docker print about it, and what to do. Pure.

Words of Pyxis 0.12 to 0.24 (pyxis_slurmstepd.c), of enroot 3 and 4 (src/common.sh, src/docker.sh, bin/enroot-mount.c;
their GitHub issues 8, 61, 78, 127, 133 and 36, 83), and of the moby daemon.
"""

from __future__ import annotations

import re

MISSING_PYXIS, BAD_MOUNT, MISSING_IMAGE, CONTAINER = "missing-pyxis", "bad-mount", "missing-image", "container"

# (kind of cause, what is printed, what it means, what to do); the first that is found counts. Groups fill both.
_TROUBLE = (
    (
        MISSING_PYXIS,
        r"srun: unrecognized option '(--container-image)(?:=.*)?'",  # the first that is given
        "this Slurm does not know {0}: Pyxis is not there",
        "container = false runs on bare metal (setup loads what is needed); else ask the site for Pyxis",
    ),
    (
        MISSING_PYXIS,
        r"srun: unrecognized option '--((?:no-)?container-\S+?)(?:=.*)?'",
        "this Slurm's Pyxis does not know --{0}",
        'remove = ["{0}"]',
    ),
    (
        BAD_MOUNT,
        r"source path does not exist: (.+)",
        "there is no {0} to mount",
        "make it, or name another under mounts; all nodes must see it",
    ),
    (
        BAD_MOUNT,
        r"failed to mount: (.+?) at (\S+): No such file or directory",
        "there is no {0} to mount",
        "make it, or name another under mounts; all nodes must see it",
    ),
    (
        BAD_MOUNT,
        r"failed to mount: (.+?) at (.+?): (.+)",
        "{0} can't be mounted: {2}",
        "look at its rights and at the options under mounts",
    ),
    (
        MISSING_IMAGE,
        r"pyxis:\s+\[ERROR\] No such file or directory: (.+)",
        "there is no image {0}",
        "make it there (enroot import -o FILE docker://IMAGE), or name another: container_image; all nodes must see it",
    ),
    (
        MISSING_IMAGE,
        r"pyxis:\s+\[ERROR\] Invalid image format: (.+)",
        "{0} is no whole squashfs image",
        "make it anew: enroot import -o FILE docker://IMAGE",
    ),
    (
        MISSING_IMAGE,
        r"pyxis:\s+\[ERROR\] Invalid image reference: (.+)",
        "enroot can't read the image's name {0}",
        "container_image: /PATH/IMAGE.sqsh or REGISTRY/IMAGE:TAG",
    ),
    (
        MISSING_IMAGE,
        r"(?s)failed to import docker image(?:: ([^\n]+))?.*?\[ERROR\][^\n]*?(40[13][^\n]*)",
        "the registry refuses the image {0}: {1}",
        "its key belongs into ~/.config/enroot/.credentials on the nodes; or import it once to a .sqsh file",
    ),
    (
        MISSING_IMAGE,
        r"(?s)failed to import docker image(?:: ([^\n]+))?.*?\[ERROR\]\s*([^\n]*)",
        "the image {0} can't be fetched: {1}",
        "look at its name and tag, and whether nodes reach the registry; or import it once to a .sqsh file",
    ),
    (
        MISSING_IMAGE,
        r"failed to import docker image(?:: (.+))?",
        "the image {0} can't be fetched",
        "look at its name and tag, and whether nodes reach the registry; or import it once to a .sqsh file",
    ),
    (
        CONTAINER,
        r"pyxis: couldn't chdir to (.+?): (.+)",
        "the container has no folder {0} to start in: {1}",
        "container_workdir, and mounts",
    ),
    (
        CONTAINER,
        r'a container with name "?(.+?)"? does not exist',
        "no container {0} is kept on the node",
        "set container_image as well",
    ),
    (
        CONTAINER,
        r"error: execve\(\): (\S+): No such file or directory",
        "there is no {0} to start",
        "python = ... names the interpreter",
    ),
    (
        CONTAINER,
        r"pyxis: (?:couldn't start container|container start failed.*|failed to create container filesystem.*)",
        "Pyxis can't make the container",
        "its own words follow",
    ),
)


# What else is printed of the same causes, where nothing of it need be put into words.
_MORE = {
    MISSING_PYXIS: r"(unrecognized|invalid|unknown) option '?--(no-)?container-",
    BAD_MOUNT: r"invalid mount config|error mounting ",
    MISSING_IMAGE: r"\[ERROR\] URL https?://\S+ returned error code|No such file or directory: \S+\.sqsh|"
    r"manifest unknown|manifest for \S+ not found|pull access denied|Unable to find image|No such image|"
    r"\[ERROR\] Could not (process|find)|pyxis: .*(image|squashfs).*(not found|No such file)",
    CONTAINER: r"pyxis: child \d+ failed|spank_pyxis\.so: \w+\(\) failed",
}


def line_pattern(kind: str) -> str:
    """For single lines of logs: everything that is printed where this is the cause."""
    patterns = [pattern for cause, pattern, _, _ in _TROUBLE if cause == kind and "(?s)" not in pattern]
    return "|".join(f"(?:{pattern})" for pattern in (*patterns, _MORE[kind]))


def container_trouble(text: str) -> tuple[str, str] | None:
    """(what is wrong, what to do) as the logs of a job step say it; None where they speak of no container."""
    for _, pattern, what, fix in _TROUBLE:
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
