"""Executor `docker`: this machine, one container a stage; a driver (driver.py) starts them and knows how they end."""

from __future__ import annotations

import csv
import getpass
import io
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors import Liveness, checks, torchrun
from nemotron_recipes.executors.docker import files as docker_files
from nemotron_recipes.executors.docker.control import (
    RUN_LABEL,
    STAGE_LABEL,
    Docker,
    Elsewhere,
    Refused,
    Unreachable,
    endpoint,
)
from nemotron_recipes.executors.docker.places import CLEARED, daemon_of, hosts_of, left_on
from nemotron_recipes.executors.docker.profile import HCA_ENV, LINK_ENV, MEETING_ENV, DockerProfile, contradictions
from nemotron_recipes.executors.driven import DrivenExecutor, driver_command, has_ended
from nemotron_recipes.executors.hosts import copies, needed_files
from nemotron_recipes.executors.hosts import network as hosts
from nemotron_recipes.executors.remote import transport
from nemotron_recipes.rundir import ATTEMPT_ENV, RANKS_HERE_ENV, RUN_ID_ENV, RunDir, StageDir, append_event
from nemotron_recipes.spec import Examination, Finding, JobHandle, Plan, Rendered, RenderedStage, StagePlan, Tree

LAUNCHER = "nemotron_recipes.executors.docker.launch"
HOME = "/tmp"  # of a user whom the image does not know; every image lets all write there

_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # Linux; WSL 2
RDMA_DEVICES = "/dev/infiniband"
_RESERVED_ENV = ("HOME", "HF_HOME")


class DockerExecutor(DrivenExecutor):
    """The `Executor` for the docker daemon of this machine."""

    name = "docker"
    profile_model = DockerProfile

    def check(self, stage: StagePlan) -> list[Problem]:
        """Secrets, reserved names, text that can't travel, and settings that docker could not follow."""
        reserved = (*_RESERVED_ENV, *LINK_ENV, *MEETING_ENV) if stage.placement.nodes > 1 else _RESERVED_ENV
        problems = [*checks.secret_problems(stage), *checks.env_problems(stage, reserved)]
        problems += checks.text_problems(stage, _worker_argv(stage))
        for key, what, fix in contradictions(_profile(stage)):
            problems.append(Problem(what, checks.where(stage, key), fix))
        if stage.placement.nodes > 1:
            problems += _apart(stage)
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
        """A daemon can't be reached, or can't do what a stage asks for; an image lacks what a worker imports; hosts
        can't work together."""
        alike: dict[tuple[object, ...], list[StagePlan]] = {}  # stages share a machine, and mostly an image
        for stage in (stage for stage in plan.stages if stage.reused is None):
            profile = _profile(stage)
            key = (stage.placement.nodes, profile.docker_host, profile.container_image, profile.user, profile.python)
            alike.setdefault(key, []).append(stage)
        for stages in alike.values():
            stage, profile = stages[0], _profile(stages[0])
            modules = tuple(dict.fromkeys(name for each in stages for name in each.launch.imports))
            ask = partial(_unfit_on, profile, stage, modules, plan.request.offline)
            try:
                if stage.placement.nodes > 1:
                    from nemotron_recipes.executors.hosts import preflight

                    yield from preflight.problems(plan, stage, profile, ask)
                else:
                    yield from ask(transport.HERE)
            except UserError as error:  # nothing more can be asked
                yield from error.problems
                return

    def examine(self, profile: Tree) -> Examination:
        """The profile, the machine, its memory and GPUs, docker and the image; of several hosts each, and what joins
        them."""
        from nemotron_recipes.executors.docker import doctor as docker_doctor
        from nemotron_recipes.executors.hosts import doctor as hosts_doctor

        wanted = DockerProfile.model_validate(profile)
        hf_cache = Path(_hf_cache(wanted))
        look = hosts_doctor.findings if wanted.hosts else docker_doctor.findings
        told = (Finding(key, "problem", f"{what}: {fix}") for key, what, fix in contradictions(wanted))
        return Examination((*told, *look(wanted, hf_cache)))

    def shell(self, handle: JobHandle, stage: str, command: Sequence[str]) -> list[str]:
        """The command in the stage's container; of several hosts, the first one's."""
        docker = Docker(handle.native["docker_host"])
        try:
            found = [docker.container(container) for container in docker.containers(handle.run, stage)]
        except (Refused, Unreachable) as error:
            raise UserError(Problem(f"docker can't be asked for run {handle.run}: {error}")) from None
        running = [container.id for container in found if container and container.running]
        if not running:
            raise UserError(Problem(f"stage {stage} of run {handle.run} has no container that runs"))
        terminal = ["--tty"] if os.isatty(0) else []
        return docker.command("exec", "--interactive", *terminal, running[0], *command)

    def settle(self, handle: JobHandle) -> list[Tree]:
        """Of containers that outlived their driver: how their stage ended, and with it the run."""
        from nemotron_recipes.executors.docker import settle as docker_settle

        return [] if has_ended(handle) else docker_settle.settle(handle)

    def _without_driver(self, handle: JobHandle) -> Liveness:
        """While docker can't be asked, nothing is known of a container, so it counts as running."""
        found = []
        try:
            for docker in (daemon_of(host, handle) for host in hosts_of(handle)):
                found += [docker.container(container) for container in docker.containers(handle.run)]
        except (Refused, Unreachable):
            return "running"
        if any(container.running for container in found if container):
            return "running"
        return "ended" if found else "lost"

    def left_behind(self, handle: JobHandle) -> list[str]:
        """Containers on hosts that were away when the run ended."""
        return [f"{host} was away when the run ended: its container may still run there" for host in left_on(handle)]

    def _stop_orphans(self, handle: JobHandle, grace: float) -> list[str]:
        run, left = RunDir(Path(handle.run_dir)), []
        for host in hosts_of(handle):
            try:
                docker = daemon_of(host, handle)
                for container in docker.containers(handle.run):
                    docker.stop(container, grace)
                    docker.remove(container)
                copies.clear(host, run)
                if host.name in left_on(handle):
                    append_event(run.events, CLEARED, host=host.name)
            except (Refused, Unreachable, transport.Unreachable, OSError) as error:
                if host.node == 0:
                    print(f"docker can't be asked to stop run {handle.run}, so its processes are: {error}")
                else:
                    left.append(f"its container on {host.name} may still run: {error}")
        docker_files.secrets(run).unlink(missing_ok=True)
        return left


def _render_stage(plan: Plan, stage: StagePlan) -> RenderedStage:
    folder, profile = StageDir(Path(stage.directory)), _profile(stage)
    machines = hosts.of_profile(profile)[: stage.placement.nodes]
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
        *_gpus(profile),
        *(("--network", network) if network else ()),
        *devices,
        *(word for mount in _mounts(plan, stage, profile, host) for word in ("--mount", mount)),
        *(word for name, value in env.items() for word in ("--env", f"{name}={value}")),
        *(word for name in inherited for word in ("--env", name)),
        *profile.options,
        *(profile.container_image, profile.python, "-m", LAUNCHER, *_worker_argv(stage)),
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


def _worker_argv(stage: StagePlan) -> tuple[str, ...]:
    profile, launch = _profile(stage), stage.launch
    if launch.launcher == "plain":
        return (profile.python, "-m", launch.module, *launch.args)
    log_dir = Path(stage.directory) / "logs" / "torchrun"
    place = stage.placement
    return torchrun.command(launch.module, launch.args, place.nproc_per_node, log_dir, place.nodes, profile.python)


def _profile(stage: StagePlan) -> DockerProfile:
    place = stage.placement  # its nodes follow from hosts, of which data prep uses the first alone
    own = {"executor": "docker", "nproc_per_node": place.nproc_per_node, "secrets": [*place.secrets]}
    return DockerProfile.model_validate({**own, **place.options})


def _apart(stage: StagePlan) -> Iterator[Problem]:
    """What a stage on several hosts needs of a run folder that only the first one has."""
    where = checks.where(stage, "hosts")
    if stage.launch.launcher != "torchrun":
        yield Problem(f"stage {stage.name} is one process: it can't use several hosts", where, "leave hosts out")
    if stage.placement.options["hosts_share_files"]:
        return
    shared = "put them on a file system that all hosts see, and set hosts_share_files = true"
    if stage.launch.writes_together:
        what = "the ranks of this backend write one checkpoint together, in the run folder"
        yield Problem(what, where, f"{shared}; or use backend=trl, of which one rank writes it")
    for key, artifact in stage.inputs.items():
        if artifact.source == "wandb":
            what = f"{key} comes from W&B when the stage runs, which copies nothing to other hosts"
            yield Problem(what, where, f"{shared}; or bring it to the store before")


def _gpus(profile: DockerProfile) -> tuple[str, ...]:
    """docker fails where there is no GPU to give, so none is asked for there."""
    if isinstance(profile.gpus, list):
        return ("--gpus", _csv("device=" + ",".join(profile.gpus)))
    given = profile.gpus == "all" or (profile.gpus == "auto" and any(map(os.path.exists, _GPU_FILES)))
    return ("--gpus", "all") if given else ()


def _mounts(plan: Plan, stage: StagePlan, profile: DockerProfile, host: hosts.Host) -> Iterator[str]:
    """Values of --mount: at their own paths what a stage writes to and what it reads; then the profile's.

    On another host the run's files and inputs are copies; the Hugging Face cache is its own.
    """
    written = (plan.run_dir, plan.store, _hf_cache(profile))
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
    yield from _profile_mounts(profile)


def _profile_mounts(profile: DockerProfile) -> Iterator[str]:
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


def _hf_cache(profile: DockerProfile) -> str:
    found = profile.hf_cache or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return os.path.abspath(os.path.expanduser(found))


def _unfit_on(
    profile: DockerProfile, stage: StagePlan, modules: Sequence[str], offline: bool, where: transport.Transport
) -> Iterator[Problem]:
    """Of the daemon there, and of the image, which must be able to import `modules`. UserError: it can't be asked, or
    it is none that a run could use."""
    try:
        docker = Docker(endpoint(profile.docker_host, where), where)
        if docker.is_podman():
            what = f"{docker.host} is Podman's socket: asked for GPUs it gives none, without a word (seen with 4.3.1)"
            raise UserError(Problem(what, checks.where(stage, "docker_host"), "use docker's own daemon"))
        found = [*_misfits(docker, profile, stage, offline)]
        yield from found
        if modules and not any(problem.refuses for problem in found):
            yield from _trial(docker, profile, stage, modules)
    except Unreachable as error:
        what = f"docker can't be used: {error}"
        raise UserError(Problem(what, checks.where(stage), _how_to_reach(error))) from None


def _misfits(docker: Docker, profile: DockerProfile, stage: StagePlan, offline: bool) -> Iterator[Problem]:
    """What the daemon could not do of the plan, before anything is started."""
    from nemotron_recipes.executors.images import check as image_check

    info = docker.info()
    rootless = any("rootless" in option for option in info.get("SecurityOptions") or [])
    if rootless and profile.user is None and os.getuid() != 0:
        what = "the daemon is rootless: your own user is 0:0 in its containers"
        yield Problem(what, checks.where(stage, "user"), 'set user = "0:0"')
    here, machine = docker.image(profile.container_image), str(info["Architecture"])
    place = checks.where(stage, "container_image")
    yield from image_check.of_docker(profile.container_image, here, machine, place, offline)


def _trial(docker: Docker, profile: DockerProfile, stage: StagePlan, modules: Sequence[str]) -> Iterator[Problem]:
    """What can't be imported in the image, with the flags that decide it."""
    from nemotron_recipes.executors.docker import trial

    gpus = _gpus(profile)
    given = [
        *("--user", profile.user or f"{os.getuid()}:{os.getgid()}", "--ipc", profile.ipc, *gpus),
        *(word for limit in profile.ulimits for word in ("--ulimit", limit)),
        *(word for mount in _profile_mounts(profile) for word in ("--mount", mount)),
        *(word for name, value in profile.env.items() for word in ("--env", f"{name}={value}")),
        *profile.options,
    ]
    where = checks.where(stage, "container_image")
    yield from trial.problems(docker, given, profile.container_image, profile.python, modules, bool(gpus), where)


def _how_to_reach(error: Unreachable) -> str:
    words = str(error)
    if isinstance(error, Elsewhere):
        return "start the run on that machine"
    if "no docker command" in words:
        return "install docker: https://docs.docker.com/engine/install"
    if "permission denied" in words:
        return "join the group docker (sudo usermod -aG docker $USER, then log in again), or use a rootless daemon"
    return (
        "start the daemon (sudo systemctl start docker), or name another: docker_host in the profile, or $DOCKER_HOST"
    )
