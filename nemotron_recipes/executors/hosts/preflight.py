"""Whether several hosts can carry out a stage together: asked of all of them before anything is written or started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nemotron_recipes.errors import NemotronError, Problem, UserError
from nemotron_recipes.executors import checks, memory
from nemotron_recipes.executors.docker.places import daemon_at
from nemotron_recipes.executors.docker.profile import DockerProfile
from nemotron_recipes.executors.folders import nearest_existing
from nemotron_recipes.executors.hosts import copies, needed_files, network
from nemotron_recipes.executors.hosts.network import Host, NoLink
from nemotron_recipes.executors.memory import GIB
from nemotron_recipes.executors.remote import there
from nemotron_recipes.executors.remote.transport import Transport
from nemotron_recipes.spec import Plan, StagePlan

# What a container is given where the machine has it: the same argv goes to all hosts.
DEVICES = {"a GPU": ("/dev/nvidiactl", "/dev/dxg"), "RDMA devices": ("/dev/infiniband",)}
_SLACK = 1 << 30  # bytes that copies must leave on a disk


def problems(
    plan: Plan, stage: StagePlan, profile: DockerProfile, of_one: Callable[[Transport], Iterator[Problem]]
) -> Iterator[Problem]:
    """All that stands in the way. UserError: a host, or its docker, can't be asked at all.

    of_one   what each host's own docker could not do
    """
    machines = network.of_profile(profile)
    unlike = [*network.unlike(machines, checks.where(stage, "hosts"))]
    if unlike:
        raise UserError(*unlike)
    for host in machines:
        yield from _named(host, of_one(host.where))
    try:
        yield from _other_images(machines, profile, stage)
        for host in machines[1:]:
            yield from _named(host, _other_host(host, plan, stage, profile))
        found = network.find_links(machines, profile.hosts_interface)
    except NoLink as error:
        yield Problem(str(error), checks.where(stage, "hosts_interface"), error.fix)
        return
    except (NemotronError, OSError) as error:
        raise UserError(Problem(str(error), checks.where(stage, "hosts"))) from None
    slow = network.too_slow(machines, found, profile.hosts_min_gbps)
    if slow:
        fix = "look at cable, port and firmware (NVIDIA's Connect Two Sparks); or lower hosts_min_gbps knowingly"
        yield Problem(slow, checks.where(stage, "hosts_min_gbps"), fix)


def _named(host: Host, found: Iterator[Problem]) -> Iterator[Problem]:
    """Each with the host's name. UserError: the same, of one that ends all."""
    try:
        for problem in found:
            yield replace(problem, what=f"{host.name}: {problem.what}")
    except UserError as error:
        raise UserError(*(Problem(f"{host.name}: {p.what}", p.where, p.fix) for p in error.problems)) from None


def _other_images(machines: Sequence[Host], profile: DockerProfile, stage: StagePlan) -> Iterator[Problem]:
    """One tag may mean two images. Docker's image stores count ids differently: a digest in common is enough."""
    told = [daemon_at(host, profile.docker_host).image(profile.container_image) for host in machines]
    first = told[0]
    for host, image in zip(machines[1:], told[1:], strict=True):
        if first is None or image is None or first["Id"] == image["Id"]:
            continue
        if not set(first.get("RepoDigests") or ()) & set(image.get("RepoDigests") or ()):
            what = f"{profile.container_image} on {host.name} is {image['Id'][:19]}, on {machines[0].name} it is"
            fix = f"docker pull it on both, or: docker save {profile.container_image} | ssh {host.name} docker load"
            yield Problem(f"{what} {first['Id'][:19]}", checks.where(stage, "container_image"), fix)


def _other_host(host: Host, plan: Plan, stage: StagePlan, profile: DockerProfile) -> Iterator[Problem]:
    """Devices, memory, folders and room there. Unreachable; OSError."""
    for what, files in DEVICES.items():
        here = any(map(os.path.exists, files))
        there_ = len(host.where.call(needed_files.missing, list(files))) < len(files)
        if here != there_:
            first, other = profile.hosts[0], host.name
            has, lacks = (first, other) if here else (other, first)
            yield Problem(f"{has} has {what}, {lacks} has none", checks.where(stage, "hosts"), "hosts must be alike")
    if profile.memory_reserve_gib is not None:
        told = host.where.call(memory.read_memory)
        where = checks.where(stage, "memory_reserve_gib")
        problem = memory.misfit(stage, profile.memory_reserve_gib, where, memory.Memory(*told) if told else None)
        yield from [problem] if problem else []
    own = [mount.split(":")[0] for mount in profile.mounts]
    for path in host.where.call(needed_files.missing, own):
        yield Problem(f"{path} of mounts is not there", checks.where(stage, "mounts"), "mounts are for all hosts")
    yield from _folders(host, plan, stage)


def _folders(host: Host, plan: Plan, stage: StagePlan) -> Iterator[Problem]:
    if not host.root:
        yield from _not_shared(host, plan, stage)
        return
    said = host.where.call(there.refusal, host.root)
    if said:
        yield Problem(said, checks.where(stage, "hosts_folder"), "set hosts_folder to one that you may write to there")
        return
    size = copies.size_of(_inputs(stage))
    place, free = host.where.call(there.room, host.root)
    if size + _SLACK > free:
        what = f"{free / GIB:.1f} GiB are free below {place}, and inputs of {size / GIB:.1f} GiB would be copied there"
        yield Problem(what, checks.where(stage, "hosts_folder"), "make room, or set hosts_folder")


def _not_shared(host: Host, plan: Plan, stage: StagePlan) -> Iterator[Problem]:
    """With hosts_share_files: what this machine writes must be seen there. A file is made and removed here."""
    for folder in (plan.run_dir, plan.store):
        probe = nearest_existing(Path(folder)) / f".nemotron-{plan.id}"
        try:
            probe.touch()
            unseen = host.where.call(needed_files.missing, [str(probe)])
        finally:
            probe.unlink(missing_ok=True)
        if unseen:
            what = f"hosts_share_files is set, but {host.name} does not see what is written to {probe.parent} here"
            yield Problem(what, checks.where(stage, "hosts_share_files"), "mount it there at the same path")


def _inputs(stage: StagePlan) -> list[Path]:
    """What would be copied, as far as it exists by now."""
    uris = [artifact.uri for artifact in stage.inputs.values() if artifact.source in ("store", "path")]
    return [path for uri in [*uris, *filter(None, [stage.resume_from])] for path in needed_files.matches(uri)]
