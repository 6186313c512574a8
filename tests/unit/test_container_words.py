"""What Slurm, Pyxis and enroot print of a container that can't be made, and what users are told."""

from __future__ import annotations

import pytest

from nemotron_recipes.artifacts.causes import recognised
from nemotron_recipes.container_words import container_trouble, nodes_of

# As Pyxis 0.24 and enroot 4.1 print them; "older" is Pyxis 0.12 to 0.20, whose mounts fail in enroot.
NO_IMAGE = """\
slurmstepd: error: pyxis: failed to create container filesystem for image: /lustre/nemo.sqsh
slurmstepd: error: pyxis: printing enroot log file:
slurmstepd: error: pyxis:     [ERROR] No such file or directory: /lustre/nemo.sqsh
slurmstepd: error: spank: required plugin spank_pyxis.so: task_init() failed with rc=-1
slurmstepd: error: Failed to invoke spank plugin stack
srun: error: node2: task 1: Exited with exit code 1
"""
NO_MOUNT = "slurmstepd: error: pyxis: --container-mounts: source path does not exist: /home/me/Automodel\n"
NO_MOUNT_OLDER = """\
slurmstepd: error: pyxis: container start failed with error code: 1
slurmstepd: error: pyxis: printing enroot log file:
slurmstepd: error: pyxis:     enroot-mount: failed to mount: /home/me/Auto model at /raid/enroot/data/x/opt/Automodel: \
No such file or directory
slurmstepd: error: pyxis:     [ERROR] Command not found or not executable: ...
"""
DENIED_MOUNT = "slurmstepd: error: pyxis:     enroot-mount: failed to mount: /a at /raid/x/b: Permission denied\n"
REFUSED = """\
slurmstepd: error: pyxis: failed to import docker image: nvcr.io#nvidia/nemo:25.07
slurmstepd: error: pyxis: printing enroot log file:
slurmstepd: error: pyxis:     [INFO] Querying registry for permission grant
slurmstepd: error: pyxis:     [ERROR] URL https://nvcr.io/proxy_auth returned error code: 401 Unauthorized
"""
NOT_FOUND = REFUSED.replace("401 Unauthorized", "404 Not Found")
WORKDIR = "slurmstepd: error: pyxis: couldn't chdir to /opt/nope: No such file or directory\n"


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        (NO_IMAGE, "there is no image /lustre/nemo.sqsh", "enroot import"),
        (NO_MOUNT, "there is no /home/me/Automodel to mount", "mounts"),
        (NO_MOUNT_OLDER, "there is no /home/me/Auto model to mount", "mounts"),
        (DENIED_MOUNT, "/a can't be mounted: Permission denied", "rights"),
        (REFUSED, "the registry refuses the image nvcr.io#nvidia/nemo:25.07: 401 Unauthorized", ".credentials"),
        (NOT_FOUND, "the image nvcr.io#nvidia/nemo:25.07 can't be fetched: URL https://", "tag"),
        ("pyxis: failed to import docker image\n", "the image can't be fetched", "tag"),
        (WORKDIR, "the container has no folder /opt/nope to start in", "container_workdir"),
        ("srun: unrecognized option '--container-image=a b'\n", "Pyxis is not there", "container = false"),
        ("srun: unrecognized option '--container-image'\n", "Pyxis is not there", "container = false"),
        ("srun: unrecognized option '--container-env'\n", "does not know --container-env", "remove"),
        ("srun: unrecognized option '--no-container-entrypoint'\n", "--no-container-entrypoint", "remove"),
        ("slurmstepd: error: execve(): python9: No such file or directory\n", "there is no python9", "python = "),
        ("slurmstepd: error: pyxis: couldn't start container\n", "can't make the container", "follow"),
    ],
)
def test_trouble(text: str, what: str, fix: str) -> None:
    found = container_trouble("some line before\n" + text + "some line after\n")
    assert found is not None
    assert what in found[0]
    assert fix in found[1]
    cause = recognised(text)
    assert cause is not None and cause.name in ("missing-pyxis", "bad-mount", "missing-image", "container")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pyxis: importing docker image: nvcr.io#nvidia/nemo:25.07\npyxis: imported docker image: nvcr.io#nvidia/nemo\n",
        "FileNotFoundError: [Errno 2] No such file or directory: '/lustre/nemo.sqsh'\n",
        "srun: error: node2: task 1: Exited with exit code 1\n",
        "srun: unrecognized option '--no-such'\n",
        "slurmstepd: error: *** STEP 1.0 ON node1 CANCELLED AT 2026-01-01T00:00:00 ***\n",
    ],
)
def test_no_trouble_of_a_container(text: str) -> None:
    assert container_trouble(text) is None


def test_the_nodes_that_are_named() -> None:
    assert nodes_of(NO_IMAGE) == ["node2"]
    both = "srun: error: node1: task 0: Exited with exit code 143\n"
    both += "srun: error: node2: task 1: Exited with exit code 1\n"
    assert nodes_of(both) == ["node2"]
    assert nodes_of("slurmstepd-node3: error: pyxis: couldn't start container\n" + both) == ["node3"]
    assert nodes_of(NO_MOUNT) == []
