"""What a daemon, and the image there, could not do of a plan: asked before anything is started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors import checks
from nemotron_recipes.executors.docker import render, trial
from nemotron_recipes.executors.docker.control import Docker, Unreachable, endpoint, how_to_reach
from nemotron_recipes.executors.docker.profile import DockerProfile
from nemotron_recipes.executors.images import check as image_check
from nemotron_recipes.executors.images.trial import Need, need
from nemotron_recipes.executors.remote import transport
from nemotron_recipes.spec import StagePlan

# Of daemons whose containers could not write to your folders; the flag takes one container out of that.
_GUARDS = (
    ("userns", "the daemon maps users (userns-remap): a container's files would not be yours", "--userns=host"),
    (
        "selinux",
        "the daemon labels its containers (SELinux): they may not touch folders without its label",
        "--security-opt=label=disable",
    ),
)


def problems(
    profile: DockerProfile, stages: Sequence[StagePlan], offline: bool, where: transport.Transport
) -> Iterator[Problem]:
    """Of the daemon there, and of the image that the stages share. UserError: it can't be asked, or it is none that a
    run could use."""
    stage, needed = stages[0], need(stages)
    try:
        docker = Docker(endpoint(profile.docker_host, where), where)
        if docker.is_podman():
            what = f"{docker.host} is Podman's socket: asked for GPUs it gives none, without a word (seen with 4.3.1)"
            raise UserError(Problem(what, checks.where(stage, "docker_host"), "use docker's own daemon"))
        found = [*_misfits(docker, profile, stage, offline)]
        yield from found
        if needed.imports and not any(problem.refuses for problem in found):
            yield from _trial(docker, profile, needed, checks.where(stage, "container_image"))
    except Unreachable as error:
        what = f"docker can't be used: {error}"
        raise UserError(Problem(what, checks.where(stage), how_to_reach(error))) from None


def _misfits(docker: Docker, profile: DockerProfile, stage: StagePlan, offline: bool) -> Iterator[Problem]:
    """What the daemon could not do of the plan, before anything is started."""
    info = docker.info()
    yield from _guarded_files(info, profile, stage)
    here, machine = docker.image(profile.container_image), str(info["Architecture"])
    place = checks.where(stage, "container_image")
    yield from image_check.of_docker(profile.container_image, here, machine, place, offline)


def _guarded_files(info: dict[str, Any], profile: DockerProfile, stage: StagePlan) -> Iterator[Problem]:
    """Whose files a container's would be, and whether it may touch them at all: `docker info`'s SecurityOptions."""
    guards = {option.partition("name=")[2].partition(",")[0] for option in info.get("SecurityOptions") or []}
    if "rootless" in guards and profile.user is None and os.getuid() != 0:
        what = "the daemon is rootless: your own user is 0:0 in its containers"
        yield Problem(what, checks.where(stage, "user"), 'set user = "0:0"')
    for guard, words, flag in _GUARDS:
        if guard in guards and flag not in profile.options:
            yield Problem(words, checks.where(stage, "options"), f'set options = ["{flag}"]')


def _trial(docker: Docker, profile: DockerProfile, needed: Need, where: str) -> Iterator[Problem]:
    """What the image lacks, tried with the flags that decide it."""
    gpus = render.gpus(profile)
    given = [
        *("--user", profile.user or f"{os.getuid()}:{os.getgid()}", "--ipc", profile.ipc, *gpus),
        *(word for limit in profile.ulimits for word in ("--ulimit", limit)),
        *(word for mount in render.profile_mounts(profile) for word in ("--mount", mount)),
        *(word for name, value in profile.env.items() for word in ("--env", f"{name}={value}")),
        *profile.options,
    ]
    yield from trial.problems(docker, given, profile.container_image, profile.python, needed, bool(gpus), where)
