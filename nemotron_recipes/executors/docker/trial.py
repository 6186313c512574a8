"""Whether what the stages' workers need is in their image: tried in a container of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from nemotron_recipes.errors import Problem
from nemotron_recipes.executors.docker.control import Docker, Refused, advice
from nemotron_recipes.executors.images import trial
from nemotron_recipes.executors.images.trial import Need


def command(name: str, given: Sequence[str], image: str, python: str, need: Need, gpu: bool) -> list[str]:
    """`docker ...`; given: flags of `docker run` as a stage gets them."""
    flags = ["--rm", "--pull", "never", "--name", name, "--network", "none", "--env", "HOME=/tmp", *given]
    return ["run", *flags, image, python, *trial.arguments(image, need, gpu)]


def problems(
    docker: Docker, given: Sequence[str], image: str, python: str, need: Need, gpu: bool, where: str
) -> Iterator[Problem]:
    """What can't be imported there. Unreachable: docker has gone meanwhile."""
    name = f"nemotron-trial-{os.getpid()}"
    try:
        said = docker.ask(*command(name, given, image, python, need, gpu), seconds=trial.SECONDS)
    except Refused as error:
        what = f"a container of image {image} can't be started: {str(error)[-600:]}"
        yield Problem(what, where, advice(str(error)) or "--skip-preflight submits without trying it")
        return
    finally:
        docker.remove(name)
    found = trial.judged(said, image, need, where)
    if found is None:
        yield Problem(f"{python} in image {image} says something else than it was asked: {said[-400:]}", where)
    else:
        yield from found
