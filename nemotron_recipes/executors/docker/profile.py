"""What a profile of executor `docker`, or `run.*` on the command line, may set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

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


# As NVIDIA measures it, a healthy rail between two Sparks carries more than 80 Gb/s, one whose ConnectX-7 came up
# degraded 8 to 25 by TCP, whatever its link says (dgx-spark-playbooks, connect-two-sparks, performance guide).
LEAST_GBPS = 26.0
# Found when the run starts, or set by the executor for each host.
LINK_ENV = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "UCX_NET_DEVICES")
HCA_ENV = "NCCL_IB_HCA"
MEETING_ENV = ("PET_MASTER_ADDR", "PET_MASTER_PORT")


class DockerProfile(DrivenProfile):
    """This machine, one container a stage. The defaults are the flags that NVIDIA's guides for its images give.

    With `hosts`, training stages run as one container on each of them.
    """

    executor: Literal["docker"] = "docker"
    nodes: Annotated[int, Field(ge=1)] = 1  # type: ignore[assignment]  # follows from hosts
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
    hosts: list[str] = Field(
        default=[], validate_default=True
    )  # this machine, then those that ssh reaches by these names
    hosts_interface: str | None = None  # of this machine, towards the others; unset: the fastest that reaches them
    hosts_min_gbps: Annotated[float, Field(gt=0)] = LEAST_GBPS  # less by TCP between two hosts: refused
    hosts_lost_seconds: Annotated[float, Field(gt=0)] = 60.0  # for so long a host, or the network, may be away
    hosts_folder: str = "~/.nemotron/hosts"  # where copies of what a run needs lie on the others
    hosts_share_files: bool = False  # all of them see the run folder, the store and inputs at the same paths: no copies
    ssh_config: str | None = None  # instead of ~/.ssh/config
    remote_python: str = "python3"  # on the other hosts: 3.10 or newer, it needs no package

    @model_validator(mode="before")
    @classmethod
    def _as_many_nodes_as_hosts(cls, fields: Any) -> Any:
        hosts = fields.get("hosts") if isinstance(fields, dict) else None
        return {"nodes": len(hosts), **fields} if isinstance(hosts, list) and hosts else fields

    @field_validator("hosts", mode="after")
    @classmethod
    def _no_other_number(cls, hosts: list[str], info: ValidationInfo) -> list[str]:
        nodes = info.data.get("nodes", 1)
        if nodes != max(1, len(hosts)):
            raise ValueError(f"must name as many hosts as there are nodes, {nodes}")
        return hosts


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
    yield from _hosts(profile)
    host = profile.docker_host
    if host is not None and not host.startswith("unix://"):
        yield "docker_host", f"{host} is not on this machine", "start the run where that daemon is: folders are mounted"


def _hosts(profile: DockerProfile) -> Iterator[tuple[str, str, str]]:
    if not profile.hosts:
        return
    if len(profile.hosts) == 1:
        yield "hosts", f"{profile.hosts[0]} alone is one machine", "leave hosts out, or name this machine and another"
    for name in profile.hosts:
        if not name or name.startswith("-") or re.search(r"\s", name):
            yield "hosts", f"{name!r} is no name of a host", "as ssh takes it: HOST or USER@HOST"
        elif profile.hosts.count(name) > 1:
            yield "hosts", f"{name} is named twice", "each host once"
            break
    if profile.network not in (None, "host"):
        yield "network", f"containers on several hosts meet on the hosts' own network, not {profile.network!r}", "host"
    if not profile.hosts_folder.startswith(("/", "~/")):
        yield "hosts_folder", f"{profile.hosts_folder!r} is not absolute", "an absolute path, or ~/..."
