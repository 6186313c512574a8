"""Whether what the stages' workers import is in their image, and works there: tried in a container of it before
anything is queued. It is lost time to find that out after an hour of data prep."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

from nemotron_recipes.errors import Problem
from nemotron_recipes.executors.docker.control import Docker, Refused, advice

SECONDS = 600.0  # a cold disk reads some GB
# On the GPU something is computed: that a wheel has no kernels for it shows in no import.
_CODE = """
import importlib, json, sys
gpu, *names = sys.argv[1:]
failed = []
for name in names:
    try:
        module = importlib.import_module(name)
        if name == "torch" and gpu == "gpu":
            module.ones(8, 8, device="cuda").sum().item()
    except BaseException as error:
        failed.append([name, f"{type(error).__name__}: {error}"[:400]])
print()
print(json.dumps({"failed": failed, "python": sys.version.split()[0]}))
"""


def command(name: str, given: Sequence[str], image: str, python: str, modules: Sequence[str], gpu: bool) -> list[str]:
    """`docker ...`; given: flags of `docker run` as a stage gets them."""
    flags = ["--rm", "--pull", "never", "--name", name, "--network", "none", "--env", "HOME=/tmp", *given]
    return ["run", *flags, image, python, "-c", _CODE, "gpu" if gpu else "cpu", *modules]


def problems(
    docker: Docker, given: Sequence[str], image: str, python: str, modules: Sequence[str], gpu: bool, where: str
) -> Iterator[Problem]:
    """What can't be imported there. Unreachable: docker has gone meanwhile."""
    name = f"nemotron-trial-{os.getpid()}"
    try:
        said = docker.ask(*command(name, given, image, python, modules, gpu), seconds=SECONDS)
    except Refused as error:
        what = f"a container of image {image} can't be started: {str(error)[-600:]}"
        yield Problem(what, where, advice(str(error)) or "--skip-preflight submits without trying it")
        return
    finally:
        docker.remove(name)
    try:
        told = json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        yield Problem(f"{python} in image {image} says something else than it was asked: {said[-400:]}", where)
        return
    for module, why in told["failed"]:
        what = f"the stages need {module}, which image {image} (Python {told['python']}) can't import: {why}"
        yield Problem(what, where, "choose the image that is made for this backend: nemotron images list")
