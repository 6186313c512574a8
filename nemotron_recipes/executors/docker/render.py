"""Per stage and host the `docker run` that starts it. Asks no daemon."""

from __future__ import annotations

import csv
import getpass
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nemotron_recipes.executors import torchrun
from nemotron_recipes.executors.docker import files as docker_files
from nemotron_recipes.executors.docker.control import RUN_LABEL, STAGE_LABEL
from nemotron_recipes.executors.docker.profile import HCA_ENV, LINK_ENV, MEETING_ENV, DockerProfile
from nemotron_recipes.executors.hosts import needed_files
from nemotron_recipes.executors.hosts import network as hosts
from nemotron_recipes.rundir import ATTEMPT_ENV, RANKS_HERE_ENV, RUN_ID_ENV, StageDir
from nemotron_recipes.spec import Plan, RenderedStage, StagePlan

LAUNCHER = "nemotron_recipes.executors.docker.launch"
HOME = "/tmp"  # of a user whom the image does not know; every image lets all write there
RDMA_DEVICES = "/dev/infiniband"

_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # Linux; WSL 2


def render_stage(plan: Plan, stage: StagePlan) -> RenderedStage:
    """One stage, on its first host and on the others."""
    folder, profile = StageDir(Path(stage.directory)), profile_of(stage)
    machines = hosts.of_profile(profile)[: stage.placement.nodes]
    env = {
        "PYTHONSAFEPATH": "1",  # `-m` looks for modules in the environment alone, not in the stage's folder
        "PYTHONUNBUFFERED": "1",
        "HOME": HOME,
        "USER": getpass.getuser(),  # torch asks for a name, and the image knows none for this uid
        "HF_HOME": hf_cache(profile),
        **stage.launch.env,
        **profile.env,
        RUN_ID_ENV: plan.id,
    }
    argvs = [_argv(plan, stage, profile, env, host, len(machines)) for host in machines]
    files = {str(folder.files / name): text for name, text in stage.launch.files.items()}
    elsewhere = {host.name: argv for host, argv in zip(machines[1:], argvs[1:], strict=True)}
    notes = _notes(profile, machines) if elsewhere else ()
    return RenderedStage(stage.name, files, argvs[0], env, stage.directory, notes=notes, elsewhere=elsewhere)


def _argv(
    plan: Plan, stage: StagePlan, profile: DockerProfile, env: dict[str, str], host: hosts.Host, number: int
) -> tuple[str, ...]:
    """The `docker run` on one of `number` hosts."""
    inherited = [ATTEMPT_ENV]  # their values come from the driver's environment, as docker does it
    network, devices = profile.network, []
    if number > 1:
        env = {**env, docker_files.NODE_ENV: str(host.node)}
        if not profile.hosts_share_files:
            env[RANKS_HERE_ENV] = str(profile.nproc_per_node)
        inherited += [*LINK_ENV, *(() if HCA_ENV in profile.env else (HCA_ENV,)), *MEETING_ENV]
        network = "host"
        devices = ["--device", f"{RDMA_DEVICES}:{RDMA_DEVICES}"] if os.path.exists(RDMA_DEVICES) else []
    return (
        "docker",
        *(("--host", profile.docker_host) if profile.docker_host else ()),
        *("run", "--detach", "--pull", "never", "--name", container_name(plan, stage)),
        *("--label", f"{RUN_LABEL}={plan.id}", "--label", f"{STAGE_LABEL}={stage.name}"),
        *("--user", profile.user or f"{os.getuid()}:{os.getgid()}"),
        *("--workdir", stage.directory, "--ipc", profile.ipc),
        *(word for limit in profile.ulimits for word in ("--ulimit", limit)),
        *gpus(profile),
        *(("--network", network) if network else ()),
        *devices,
        *(word for mount in _mounts(plan, stage, profile, host) for word in ("--mount", mount)),
        *(word for name, value in env.items() for word in ("--env", f"{name}={value}")),
        *(word for name in inherited for word in ("--env", name)),
        *profile.options,
        *(profile.container_image, profile.python, "-m", LAUNCHER, *worker_argv(stage)),
    )


def _notes(profile: DockerProfile, machines: list[hosts.Host]) -> tuple[tuple[str, str], ...]:
    """What happens around several containers."""
    others = ", ".join(host.name for host in machines[1:])
    link = profile.hosts_interface or "the fastest interface that reaches them, found when it starts"
    files = f"copied over ssh below {machines[1].root}, brought back, and the run's folder removed there at the end"
    return (
        ("hosts", f"{machines[0].name} here, {others} over ssh"),
        ("network", f"{link}; less than {profile.hosts_min_gbps:g} Gb/s by TCP is refused"),
        ("files", "seen by all hosts at the same paths" if profile.hosts_share_files else files),
    )


def container_name(plan: Plan, stage: StagePlan) -> str:
    """Names the run and the stage; docker lets no second container have it."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", f"{plan.id}.{stage.name}")


def worker_argv(stage: StagePlan) -> tuple[str, ...]:
    """What the container's first process starts."""
    profile, launch = profile_of(stage), stage.launch
    if launch.launcher == "plain":
        return (profile.python, "-m", launch.module, *launch.args)
    log_dir = Path(stage.directory) / "logs" / "torchrun"
    place = stage.placement
    return torchrun.command(launch.module, launch.args, place.nproc_per_node, log_dir, place.nodes, profile.python)


def profile_of(stage: StagePlan) -> DockerProfile:
    """The profile that the stage's placement was made of."""
    place = stage.placement  # its nodes follow from hosts, of which data prep uses the first alone
    own = {"executor": "docker", "nproc_per_node": place.nproc_per_node, "secrets": [*place.secrets]}
    return DockerProfile.model_validate({**own, **place.options})


def gpus(profile: DockerProfile) -> tuple[str, ...]:
    """docker fails where there is no GPU to give, so none is asked for there."""
    if isinstance(profile.gpus, list):
        return ("--gpus", _csv("device=" + ",".join(profile.gpus)))
    given = profile.gpus == "all" or (profile.gpus == "auto" and any(map(os.path.exists, _GPU_FILES)))
    return ("--gpus", "all") if given else ()


def _mounts(plan: Plan, stage: StagePlan, profile: DockerProfile, host: hosts.Host) -> Iterator[str]:
    """Values of --mount: at their own paths what a stage writes to and what it reads; then the profile's.

    On another host the run's files and inputs are copies; the Hugging Face cache is its own.
    """
    written = (plan.run_dir, plan.store, hf_cache(profile))
    for path in written[:2]:
        yield _bind(host.place(path), path)
    yield _bind(written[2], written[2])
    inputs = [artifact.uri for artifact in stage.inputs.values() if artifact.source == "path"]
    given: list[str] = []
    for path in [*inputs, *([stage.resume_from] if stage.resume_from else [])]:
        real = needed_files.above_glob(path)
        if not any(Path(real).is_relative_to(folder) for folder in (*written, *given)):
            given.append(real)
            yield _bind(host.place(real), real, readonly=True)
    yield from profile_mounts(profile)


def profile_mounts(profile: DockerProfile) -> Iterator[str]:
    """Values of --mount for the profile's own `mounts`."""
    for mount in profile.mounts:
        source, target, *options = mount.split(":")
        yield _bind(source, target, readonly=options == ["ro"])


def _bind(source: str, target: str, readonly: bool = False) -> str:
    """--mount, unlike -v, fails where the source is missing, and takes a path with a colon."""
    return _csv("type=bind", f"source={source}", f"target={target}", *(("readonly",) if readonly else ()))


def _csv(*fields: str) -> str:
    """As docker's command reads some of its flags."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()


def hf_cache(profile: DockerProfile) -> str:
    """HF_HOME: the folder outside, which has the same path inside."""
    found = profile.hf_cache or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return os.path.abspath(os.path.expanduser(found))
