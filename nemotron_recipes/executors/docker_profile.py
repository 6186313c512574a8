"""What a profile of executor `docker`, or `run.*` on the command line, may set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from nemotron_recipes.executors.driven import DrivenProfile

# Flags of `docker run` that are not to be had through `options`, each with what to set instead.
OWN_FLAGS = {
    **dict.fromkeys(("--name", "--label", "-l"), "nothing: a run finds its containers by them"),
    **dict.fromkeys(("--detach", "-d", "--interactive", "-i", "--tty", "-t"), "--run or --batch"),
    **dict.fromkeys(("--rm", "--restart"), "nothing: the exit code is read from the container when it has ended"),
    **dict.fromkeys(("--env", "-e", "--env-file"), "env and secrets"),
    **dict.fromkeys(("--volume", "-v", "--mount"), "mounts"),
    **dict.fromkeys(("--user", "-u"), "user"),
    **dict.fromkeys(("--workdir", "-w"), "nothing: a stage runs in its own folder"),
    **dict.fromkeys(("--network", "--net"), "network"),
    **dict.fromkeys(
        ("--pid", "--init"), "nothing: the launcher is the container's first process, and reaps the others"
    ),
    "--gpus": "gpus",
    "--ipc": "ipc",
    "--ulimit": "ulimits",
    "--pull": "nothing: fetch the image before, with docker pull",
}


class DockerProfile(DrivenProfile):
    """This machine, one container a stage. The defaults are the flags that NVIDIA's guides for its images give."""

    executor: Literal["docker"] = "docker"
    container_image: Annotated[str, Field(min_length=1)]  # as docker wants it; it must be on this machine
    python: str = "python3"  # interpreter in the image
    gpus: Literal["auto", "all", "none"] | list[str] = "auto"  # auto: all where there are some; else numbers or UUIDs
    mounts: list[str] = Field(default=[])  # HOST:CONTAINER[:ro]; what a stage writes and reads is there anyway
    hf_cache: str | None = None  # unset: $HF_HOME, or ~/.cache/huggingface
    network: str | None = None  # unset: docker's default
    ipc: str = "host"  # shared memory for data loaders and NCCL; --shm-size has no effect beside "host"
    ulimits: list[str] = Field(default=["memlock=-1", "stack=67108864"])
    user: str | None = None  # UID:GID; unset: yours. A rootless daemon needs "0:0", which is you there
    options: list[str] = Field(default=[])  # further flags of docker run, one word each
    docker_host: str | None = None  # unset: $DOCKER_HOST, or the current docker context
    max_restarts: Annotated[int, Field(ge=0)] = 3  # how often a stage goes on when the docker daemon has ended it


def contradictions(profile: DockerProfile) -> Iterator[tuple[str, str, str]]:
    """(field, what, fix) for what docker could make no sense of, or what the executor decides."""
    if profile.container_image.startswith("-") or re.search(r"\s", profile.container_image):
        yield "container_image", f"{profile.container_image!r} is no reference to an image", "REGISTRY/NAME:TAG"
    for mount in profile.mounts:
        parts = mount.split(":")
        if (
            len(parts) not in (2, 3)
            or not all(part.startswith("/") for part in parts[:2])
            or parts[2:] not in ([], ["ro"])
        ):
            yield "mounts", f"{mount!r} is no mount", "HOST:CONTAINER or HOST:CONTAINER:ro, both absolute"
    if profile.user is not None and not re.fullmatch(r"\d+:\d+", profile.user):
        yield "user", f"{profile.user!r} is no user", "UID:GID, two numbers"
    for option in profile.options:
        flag = option.partition("=")[0] if option.startswith("--") else option[:2]  # -eNAME=VALUE is one word
        if flag in OWN_FLAGS:
            yield "options", f"{flag} is decided by the executor", f"set {OWN_FLAGS[flag]}"
    host = profile.docker_host
    if host is not None and not host.startswith("unix://"):
        yield "docker_host", f"{host} is not on this machine", "start the run where that daemon is: folders are mounted"
