"""Whether what the stages' workers need is in their image: tried in a container of it, on a node that is free now.

Only of images that lie in a file: one that nodes would have to fetch first takes longer than anybody waits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence

from nemotron_recipes.errors import Problem
from nemotron_recipes.executors import checks
from nemotron_recipes.executors.images import trial
from nemotron_recipes.executors.images.enroot import image_for_pyxis
from nemotron_recipes.executors.images.trial import Need
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.slurm import container
from nemotron_recipes.executors.slurm.profile import SlurmProfile
from nemotron_recipes.executors.slurm.script import profile_of
from nemotron_recipes.spec import StagePlan

NODE_SECONDS = 15  # for a node to be free
_SKIP = "--skip-preflight submits without trying it"
# Python with what the launcher would add to its environment, which an image's own must not beat.
_WITH = (
    "import json, os, sys; os.environ.update(json.loads(sys.argv[1])); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)
# Somebody began to start a container, or a program in it; what else srun says is that it has no node.
_STARTED = re.compile(r"pyxis|enroot|execve|slurmstepd(?!.*(oom|memory))", re.IGNORECASE)
_known: dict[tuple[str, ...], tuple[Problem, ...]] = {}  # a sweep's runs ask the same, one after the other


def problems(stages: Sequence[StagePlan], mode: str) -> Iterator[Problem]:
    """What the images lack, or why that is not known. Unreachable: the cluster's commands."""
    alike: dict[tuple[object, ...], list[StagePlan]] = {}
    for stage in stages:
        profile = profile_of(stage)
        if profile.image is not None and stage.launch.imports:
            key = (profile.image, profile.interpreter, profile.partition_for(mode), profile.container_name)
            alike.setdefault(key, []).append(stage)
    for group in alike.values():
        profile, where = profile_of(group[0]), checks.where(group[0], "container_image")
        if not (profile.image or "").startswith("/") and not profile.container_name:
            what = f"whether {profile.image} holds what the stages need is not tried: nodes would fetch it first"
            fix = "nemotron images import it once, and name the file"
            yield Problem(what, where, fix, refuses=False)
            continue
        argv = tuple(command(profile, trial.need(group), mode))
        if argv not in _known:
            _known[argv] = tuple(_tried(argv, profile, trial.need(group), where))
        yield from _known[argv]


def command(profile: SlurmProfile, need: Need, mode: str) -> list[str]:
    """`srun ...`: one task on one node, in the container of a stage less the run's own folders."""
    assert profile.image is not None
    given = {
        "account": profile.account,
        "partition": profile.partition_for(mode),
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "gres": profile.gres,
        "gpus-per-node": 1 if profile.gpus_per_node or profile.gpus_per_task else None,
        "reservation": profile.additional_parameters.get("reservation"),
        "container-env": ",".join(profile.container_env),
        "container-mounts": ",".join(profile.mounts),
    }
    flags = [
        *("--nodes=1", "--ntasks=1", "--job-name=nemotron-trial", "--chdir=/", f"--immediate={NODE_SECONDS}"),
        f"--time={math.ceil(trial.SECONDS / 60)}",
        *(f"--{name}={value}" for name, value in given.items() if value),
        f"--container-image={image_for_pyxis(profile.image)}",
        *container.flags_of(profile),
    ]
    removed = {flag.lstrip("-").replace("_", "-") for flag in profile.remove}
    flags = [flag for flag in flags if flag.lstrip("-").partition("=")[0] not in removed]
    environment = {**container.home(profile), **profile.env}
    python = (profile.interpreter, "-c", _WITH, json.dumps(environment))
    return ["srun", *flags, *python, *trial.arguments(profile.image, need, _has_gpu(profile))]


def _has_gpu(profile: SlurmProfile) -> bool:
    return bool(profile.gpus_per_node or profile.gpus_per_task or "gpu" in (profile.gres or ""))


def _tried(argv: Sequence[str], profile: SlurmProfile, need: Need, where: str) -> Iterator[Problem]:
    image = profile.image or ""
    said = transport.call(there.step, argv, NODE_SECONDS + trial.SECONDS, profile.secrets)
    found = trial.judged(said.get("out", ""), image, need, where)
    if found is not None:
        yield from found
        return
    last = " / ".join(said.get("err", "").strip().splitlines()[-3:])
    if said.get("code") and _STARTED.search(last):
        yield Problem(
            f"a container of {image} can't be started, or its {profile.interpreter} can't: {last}", where, _SKIP
        )
        return
    if said.get("missing"):
        last = "there is no srun"
    elif said.get("late"):
        last = f"no answer within {NODE_SECONDS + trial.SECONDS:.0f} s"
    yield Problem(f"whether {image} holds what the stages need could not be tried: {last}", where, refuses=False)
