"""Executor `docker`: this machine, one container a stage; a driver (driver.py) starts them and knows how they end."""

from __future__ import annotations

import csv
import getpass
import glob
import io
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors import Liveness, checks, docker_files, torchrun
from nemotron_recipes.executors.docker_control import (
    RUN_LABEL,
    STAGE_LABEL,
    Docker,
    Refused,
    Unreachable,
    endpoint,
)
from nemotron_recipes.executors.docker_profile import DockerProfile, contradictions
from nemotron_recipes.executors.driven import DrivenExecutor, driver_command, has_ended
from nemotron_recipes.executors.left_behind import remove_secrets
from nemotron_recipes.executors.verdict import failure_cause
from nemotron_recipes.rundir import ATTEMPT_ENV, RUN_ID_ENV, RunDir, StageDir, append_event, read_json, read_jsonl
from nemotron_recipes.spec import Examination, JobHandle, Plan, Rendered, RenderedStage, StagePlan, Tree

LAUNCHER = "nemotron_recipes.executors.docker_launch"
HOME = "/tmp"  # of a user whom the image does not know; every image lets all write there

_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # Linux; WSL 2
_RESERVED_ENV = ("HOME", "HF_HOME")


class DockerExecutor(DrivenExecutor):
    """The `Executor` for the docker daemon of this machine."""

    name = "docker"
    profile_model = DockerProfile

    def check(self, stage: StagePlan) -> list[Problem]:
        """Secrets, reserved names, text that can't travel, and settings that docker could not follow."""
        problems = [*checks.secret_problems(stage), *checks.env_problems(stage, _RESERVED_ENV)]
        problems += checks.text_problems(stage, _worker_argv(stage))
        for key, what, fix in contradictions(_profile(stage)):
            problems.append(Problem(what, checks.where(stage, key), fix))
        return problems

    def render(self, plan: Plan) -> Rendered:
        """Per stage the `docker run` that starts it, and the driver's command line. Asks no daemon."""
        stages = tuple(_render_stage(plan, stage) for stage in plan.stages if stage.reused is None)
        return Rendered(stages, driver_command(plan))

    def submit(self, plan: Plan, rendered: Rendered) -> JobHandle:
        """As every driven executor; docker would make missing folders itself, but for root."""
        for folder in (plan.store, _hf_cache(_profile(plan.stages[0]))):
            Path(folder).mkdir(parents=True, exist_ok=True)
        return super().submit(plan, rendered)

    def _unfit(self, plan: Plan) -> Iterator[Problem]:
        """The daemon can't be reached, or can't do what a stage asks for."""
        for stage in (stage for stage in plan.stages if stage.reused is None):
            profile = _profile(stage)
            try:
                docker = Docker(endpoint(profile.docker_host))
                if not docker.host.startswith("unix://"):
                    what = f"docker's daemon is at {docker.host}: folders of this machine can't be mounted there"
                    yield Problem(what, checks.where(stage, "docker_host"), "start the run on that machine")
                    return
                if docker.is_podman():
                    what = f"{docker.host} is Podman's socket, on which this executor is not proved"
                    yield Problem(what, checks.where(stage, "docker_host"), "use docker's own daemon")
                    return
                yield from _misfits(docker, profile, stage)
            except Unreachable as error:
                what = f"docker can't be used: {error}"
                yield Problem(what, checks.where(stage), _how_to_reach(str(error)))
                return

    def examine(self, profile: Tree) -> Examination:
        """The machine, its memory and GPUs, docker and the image."""
        from nemotron_recipes.executors import docker_doctor

        wanted = DockerProfile.model_validate(profile)
        return Examination(tuple(docker_doctor.findings(wanted, Path(_hf_cache(wanted)))))

    def shell(self, handle: JobHandle, stage: str, command: Sequence[str]) -> list[str]:
        """The command in the stage's container."""
        docker = Docker(handle.native["docker_host"])
        try:
            found = [docker.container(container) for container in docker.containers(handle.run, stage)]
        except (Refused, Unreachable) as error:
            raise UserError(Problem(f"docker can't be asked for run {handle.run}: {error}")) from None
        running = [container.id for container in found if container and container.running]
        if not running:
            raise UserError(Problem(f"stage {stage} of run {handle.run} has no container that runs"))
        terminal = ["--tty"] if os.isatty(0) else []
        return ["docker", "--host", docker.host, "exec", "--interactive", *terminal, running[0], *command]

    def settle(self, handle: JobHandle) -> list[Tree]:
        """Of a container that outlived its driver: how its stage ended, and with it the run."""
        run = RunDir(Path(handle.run_dir))
        if has_ended(handle):
            return []
        started = [event for event in read_jsonl(run.events) if event["event"] == "stage-started"][-1:]
        docker = Docker(handle.native["docker_host"])
        try:
            found = docker.container(started[0]["container"]) if started else None
        except (Refused, Unreachable):
            return []
        if found is None:
            with suppress(OSError):
                remove_secrets(run, docker_files.secrets(run))
            return []
        if found.running:
            return []
        missing = _ending(run, found.exit_code)
        with suppress(OSError, Refused, Unreachable):  # somebody else's run: only read
            for event in missing:
                append_event(run.events, **event)
            docker_files.secrets(run).unlink(missing_ok=True)
            docker.remove(found.id)
        return missing

    def _without_driver(self, handle: JobHandle) -> Liveness:
        """While docker can't be asked, nothing is known of a container, so it counts as running."""
        docker = Docker(handle.native["docker_host"])
        try:
            found = [docker.container(container) for container in docker.containers(handle.run)]
        except (Refused, Unreachable):
            return "running"
        if any(container.running for container in found if container):
            return "running"
        return "ended" if found else "lost"

    def _stop_orphans(self, handle: JobHandle, grace: float) -> None:
        docker = Docker(handle.native["docker_host"])
        try:
            for container in docker.containers(handle.run):
                docker.stop(container, grace)
                docker.remove(container)
        except (Refused, Unreachable) as error:
            print(f"docker can't be asked to stop run {handle.run}, so its processes are: {error}")
        docker_files.secrets(RunDir(Path(handle.run_dir))).unlink(missing_ok=True)


def _render_stage(plan: Plan, stage: StagePlan) -> RenderedStage:
    folder, profile = StageDir(Path(stage.directory)), _profile(stage)
    user = profile.user or f"{os.getuid()}:{os.getgid()}"
    env = {
        "PYTHONSAFEPATH": "1",  # `-m` looks for modules in the environment alone, not in the stage's folder
        "PYTHONUNBUFFERED": "1",
        "HOME": HOME,
        "USER": getpass.getuser(),  # torch asks for a name, and the image knows none for this uid
        "HF_HOME": _hf_cache(profile),
        **stage.launch.env,
        **profile.env,
        RUN_ID_ENV: plan.id,
    }
    argv = [
        "docker",
        *(("--host", profile.docker_host) if profile.docker_host else ()),
        *("run", "--detach", "--pull", "never", "--name", container_name(plan, stage)),
        *("--label", f"{RUN_LABEL}={plan.id}", "--label", f"{STAGE_LABEL}={stage.name}"),
        *("--user", user, "--workdir", stage.directory, "--ipc", profile.ipc),
        *(word for limit in profile.ulimits for word in ("--ulimit", limit)),
        *_gpus(profile),
        *(("--network", profile.network) if profile.network else ()),
        *(word for mount in _mounts(plan, stage, profile) for word in ("--mount", mount)),
        *(word for name, value in env.items() for word in ("--env", f"{name}={value}")),
        *("--env", ATTEMPT_ENV),  # its value comes from the driver's environment, as docker does it
        *profile.options,
        *(profile.container_image, profile.python, "-m", LAUNCHER, *_worker_argv(stage)),
    ]
    files = {str(folder.files / name): text for name, text in stage.launch.files.items()}
    return RenderedStage(stage.name, files, tuple(argv), env, stage.directory)


def container_name(plan: Plan, stage: StagePlan) -> str:
    """Names the run and the stage; docker lets no second container have it."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", f"{plan.id}.{stage.name}")


def _worker_argv(stage: StagePlan) -> tuple[str, ...]:
    profile, launch = _profile(stage), stage.launch
    if launch.launcher == "plain":
        return (profile.python, "-m", launch.module, *launch.args)
    log_dir = Path(stage.directory) / "logs" / "torchrun"
    nproc = stage.placement.nproc_per_node
    return torchrun.command(launch.module, launch.args, nproc, log_dir, python=profile.python)


def _profile(stage: StagePlan) -> DockerProfile:
    place = stage.placement
    own = {"executor": "docker", "nodes": place.nodes, "nproc_per_node": place.nproc_per_node}
    return DockerProfile.model_validate({**own, "secrets": [*place.secrets], **place.options})


def _gpus(profile: DockerProfile) -> tuple[str, ...]:
    """docker fails where there is no GPU to give, so none is asked for there."""
    if isinstance(profile.gpus, list):
        return ("--gpus", _csv("device=" + ",".join(profile.gpus)))
    given = profile.gpus == "all" or (profile.gpus == "auto" and any(map(os.path.exists, _GPU_FILES)))
    return ("--gpus", "all") if given else ()


def _mounts(plan: Plan, stage: StagePlan, profile: DockerProfile) -> Iterator[str]:
    """Values of --mount: at their own paths what a stage writes to and what it reads; then the profile's."""
    written = (plan.run_dir, plan.store, _hf_cache(profile))
    for path in written:
        yield _bind(path, path)
    inputs = [artifact.uri for artifact in stage.inputs.values() if artifact.source == "path"]
    given: list[str] = []
    for path in [*inputs, *([stage.resume_from] if stage.resume_from else [])]:
        real = path if os.path.exists(path) else _above_glob(path)
        if not any(Path(real).is_relative_to(folder) for folder in (*written, *given)):
            given.append(real)
            yield _bind(real, real, readonly=True)
    for mount in profile.mounts:
        source, target, *options = mount.split(":")
        yield _bind(source, target, readonly=options == ["ro"])


def _above_glob(pattern: str) -> str:
    """The deepest folder above the first wildcard."""
    path = Path(pattern)
    while glob.has_magic(str(path)):
        path = path.parent
    return str(path)


def _bind(source: str, target: str, readonly: bool = False) -> str:
    """--mount, unlike -v, fails where the source is missing, and takes a path with a colon."""
    return _csv("type=bind", f"source={source}", f"target={target}", *(("readonly",) if readonly else ()))


def _csv(*fields: str) -> str:
    """As docker's command reads some of its flags."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()


def _hf_cache(profile: DockerProfile) -> str:
    found = profile.hf_cache or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return os.path.abspath(os.path.expanduser(found))


def _misfits(docker: Docker, profile: DockerProfile, stage: StagePlan) -> Iterator[Problem]:
    """What the daemon could not do of the plan, before anything is started."""
    info = docker.info()
    rootless = any("rootless" in option for option in info.get("SecurityOptions") or [])
    if rootless and profile.user is None and os.getuid() != 0:
        what = "the daemon is rootless: your own user is 0:0 in its containers"
        yield Problem(what, checks.where(stage, "user"), 'set user = "0:0"')
    image = docker.image(profile.container_image)
    if image is None:
        what = f"image {profile.container_image} is not on this machine"
        yield Problem(what, checks.where(stage, "container_image"), f"docker pull {profile.container_image}")
    elif not _same_architecture(str(image["Architecture"]), str(info["Architecture"])):
        what = f"image {profile.container_image} is for {image['Architecture']}, this machine is {info['Architecture']}"
        yield Problem(what, checks.where(stage, "container_image"), "choose one for this machine")


def _same_architecture(image: str, machine: str) -> bool:
    """Images have Go's words for architectures, machines the kernel's."""
    words = {"x86_64": "amd64", "aarch64": "arm64"}
    return words.get(image, image) == words.get(machine, machine)


def _how_to_reach(words: str) -> str:
    if "no docker command" in words:
        return "install docker: https://docs.docker.com/engine/install"
    if "permission denied" in words:
        return "join the group docker (sudo usermod -aG docker $USER, then log in again), or use a rootless daemon"
    return (
        "start the daemon (sudo systemctl start docker), or name another: docker_host in the profile, or $DOCKER_HOST"
    )


def _ending(run: RunDir, exit_code: int) -> list[Tree]:
    """What a driver would have written of the end of the newest stage, of whose container docker says `exit_code`."""
    events = list(read_jsonl(run.events))
    started = [event for event in events if event["event"] == "stage-started"][-1]
    name, attempt = started["stage"], started["attempt"]
    stage, plan = StageDir(run.stage(name).path), read_json(run.plan) or {"stages": []}
    report = docker_files.read_report(stage, attempt)
    code = report.exit_code if report else exit_code or docker_files.KILLED
    seconds = round(max(0.0, (report.time if report else time.time()) - started["time"]), 3)
    log = stage.launcher_log(attempt)
    failure = torchrun.first_failure(log) if code else None
    exited: Tree = {"event": "stage-exited", "stage": name, "attempt": attempt, "exit_code": code, "seconds": seconds}
    told = any((e["event"], e.get("stage"), e.get("attempt")) == ("stage-exited", name, attempt) for e in events)
    fingerprints = {planned["name"]: planned["fingerprint"] for planned in plan["stages"]}
    cause = failure_cause(stage, fingerprints[name], attempt, code, failure, log)
    end: Tree = {"event": "finished", "state": "succeeded"}
    if cause:
        end = {"event": "finished", "state": "failed", "stage": name, "cause": cause}
    elif name != plan["stages"][-1]["name"]:
        cause = "its driver was killed before the next stage could start; submit it again to go on"
        end = {"event": "finished", "state": "failed", "stage": None, "cause": cause}
    return [end] if told else [exited, end]
