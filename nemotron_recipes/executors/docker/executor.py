"""Executor `docker`: this machine, one container a stage; a driver (driver.py) starts them and knows how they end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors import Liveness, checks
from nemotron_recipes.executors.docker import files as docker_files
from nemotron_recipes.executors.docker.control import Docker, Refused, Unreachable
from nemotron_recipes.executors.docker.places import CLEARED, daemon_of, hosts_of, left_on
from nemotron_recipes.executors.docker.profile import LINK_ENV, MEETING_ENV, DockerProfile, contradictions
from nemotron_recipes.executors.docker.render import hf_cache, profile_of, render_stage, worker_argv
from nemotron_recipes.executors.driven import DrivenExecutor, driver_command, has_ended
from nemotron_recipes.executors.hosts import copies
from nemotron_recipes.executors.remote import transport
from nemotron_recipes.rundir import RunDir, append_event
from nemotron_recipes.spec import Examination, Finding, JobHandle, Plan, Rendered, StagePlan, Tree

_RESERVED_ENV = ("HOME", "HF_HOME")


class DockerExecutor(DrivenExecutor):
    """The `Executor` for the docker daemon of this machine."""

    name = "docker"
    profile_model = DockerProfile

    def check(self, stage: StagePlan) -> list[Problem]:
        """Secrets, reserved names, text that can't travel, and settings that docker could not follow."""
        reserved = (*_RESERVED_ENV, *LINK_ENV, *MEETING_ENV) if stage.placement.nodes > 1 else _RESERVED_ENV
        problems = [*checks.secret_problems(stage), *checks.env_problems(stage, reserved)]
        problems += checks.text_problems(stage, worker_argv(stage))
        for key, what, fix in contradictions(profile_of(stage)):
            problems.append(Problem(what, checks.where(stage, key), fix))
        if stage.placement.nodes > 1:
            problems += _apart(stage)
        return problems

    def render(self, plan: Plan) -> Rendered:
        """Per stage the `docker run` that starts it, and the driver's command line. Asks no daemon."""
        stages = tuple(render_stage(plan, stage) for stage in plan.stages if stage.reused is None)
        return Rendered(stages, driver_command(plan))

    def submit(self, plan: Plan, rendered: Rendered) -> JobHandle:
        """As every driven executor; docker would make missing folders itself, but for root."""
        for folder in (plan.store, hf_cache(profile_of(plan.stages[0]))):
            Path(folder).mkdir(parents=True, exist_ok=True)
        return super().submit(plan, rendered)

    def _unfit(self, plan: Plan) -> Iterator[Problem]:
        """A daemon can't be reached, or can't do what a stage asks for; an image lacks what a worker imports; hosts
        can't work together."""
        from nemotron_recipes.executors.docker import preflight
        from nemotron_recipes.executors.hosts import preflight as hosts_preflight

        alike: dict[tuple[object, ...], list[StagePlan]] = {}  # stages share a machine, and mostly an image
        for stage in (stage for stage in plan.stages if stage.reused is None):
            profile = profile_of(stage)
            key = (stage.placement.nodes, profile.docker_host, profile.container_image, profile.user, profile.python)
            alike.setdefault(key, []).append(stage)
        told: set[str] = set()
        for stages in alike.values():
            stage, profile = stages[0], profile_of(stages[0])
            ask = partial(preflight.problems, profile, stages, plan.request.offline)
            try:
                if stage.placement.nodes > 1:
                    yield from hosts_preflight.problems(plan, stage, profile, ask)
                else:
                    yield from ask(transport.HERE)
            except UserError as error:  # nothing more can be asked there; other hosts, of another stage, can
                yield from (problem for problem in error.problems if problem.what not in told)
                told |= {problem.what for problem in error.problems}

    def examine(self, profile: Tree) -> Examination:
        """The profile, the machine, its memory and GPUs, docker and the image; of several hosts each, and what joins
        them."""
        from nemotron_recipes.executors.docker import doctor as docker_doctor
        from nemotron_recipes.executors.hosts import doctor as hosts_doctor

        wanted = DockerProfile.model_validate(profile)
        look = hosts_doctor.findings if wanted.hosts else docker_doctor.findings
        told = (Finding(key, "problem", f"{what}: {fix}") for key, what, fix in contradictions(wanted))
        return Examination((*told, *look(wanted, Path(hf_cache(wanted)))))

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
