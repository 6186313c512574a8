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
from nemotron_recipes.executors.docker.render import hf_cache
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
    """All that stands in the way, of all hosts. UserError: this machine is not the first of them.

    of_one   what each host's own docker could not do
    """
    machines, where = network.of_profile(profile), checks.where(stage, "hosts")
    told, away = network.ask_all(machines, where)
    yield from away
    yield from network.unlike(machines, told, where)
    machines = [host for host in machines if host.node in told]
    with_docker = []
    for host in machines:
        try:
            yield from _named(host, of_one(host.where))
            with_docker.append(host)
        except UserError as error:
            yield from (replace(problem, what=f"{host.name}: {problem.what}") for problem in error.problems)
    yield from _guarded(where, _other_images(with_docker, profile, stage))
    for host in machines[1:]:
        yield from _guarded(where, _named(host, _other_host(host, plan, stage, profile)))
    yield from _guarded(where, _links(machines, stage, profile))


def _guarded(where: str, found: Iterator[Problem]) -> Iterator[Problem]:
    """Who can't be asked any more is a problem like the others."""
    try:
        yield from found
    except (NemotronError, OSError) as error:
        yield Problem(str(error), where)


def _named(host: Host, found: Iterator[Problem]) -> Iterator[Problem]:
    """Each with the host's name."""
    for problem in found:
        yield replace(problem, what=f"{host.name}: {problem.what}")


def _links(machines: Sequence[Host], stage: StagePlan, profile: DockerProfile) -> Iterator[Problem]:
    """What the network between them is, and carries."""
    try:
        found = network.find_links(machines, profile.hosts_interface)
    except NoLink as error:
        yield Problem(str(error), checks.where(stage, "hosts_interface"), error.fix)
        return
    slow = network.too_slow(machines, found, profile.hosts_min_gbps)
    if slow:
        fix = "look at cable, port and firmware (NVIDIA's Connect Two Sparks); or lower hosts_min_gbps knowingly"
        yield Problem(slow, checks.where(stage, "hosts_min_gbps"), fix)


def _other_images(machines: Sequence[Host], profile: DockerProfile, stage: StagePlan) -> Iterator[Problem]:
    """One tag may mean two images. Docker's image stores count ids differently: a digest in common is enough."""
    told = [daemon_at(host, profile.docker_host).image(profile.container_image) for host in machines]
    first = told[0] if told else None
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
    yield from _models(host, stage, profile)


def _folders(host: Host, plan: Plan, stage: StagePlan) -> Iterator[Problem]:
    if not host.root:
        yield from _not_shared(host, plan, stage)
        return
    said = host.where.call(there.refusal, host.root)
    if said:
        yield Problem(said, checks.where(stage, "hosts_folder"), "set hosts_folder to one that you may write to there")
        return
    size = copies.missing_bytes(host, _inputs(stage))
    place, free = host.where.call(there.room, host.root)
    if size + _SLACK > free:
        what = f"{free / GIB:.1f} GiB are free below {place}, and inputs of {size / GIB:.1f} GiB would be copied there"
        yield Problem(what, checks.where(stage, "hosts_folder"), "make room, or set hosts_folder")


def _models(host: Host, stage: StagePlan, profile: DockerProfile) -> Iterator[Problem]:
    """Hub models that its own cache lacks, each as large as in the cache here: is there room, and a way to get them?"""
    cache, where = hf_cache(profile), checks.where(stage, "hf_cache")
    fetched = 0
    for artifact in stage.inputs.values():
        if artifact.source != "hub" or not artifact.revision:
            continue
        folder = Path(cache, "hub", f"models--{artifact.name.replace('/', '--')}")
        if not host.where.call(needed_files.missing, [str(folder / "snapshots" / artifact.revision)]):
            continue
        size = sum(path.stat().st_size for path in folder.glob("blobs/*"))
        fetched += size
        bring = f"rsync -a --mkpath {folder}/ {host.name}:{folder}/"
        if profile.env.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
            yield Problem(f"{artifact.label} is not in its {cache}, and HF_HUB_OFFLINE is set", where, bring)
        else:
            weighs = f" ({size / GIB:.1f} GiB)" if size else ""
            what = f"{artifact.label}{weighs} is not in its {cache}: its ranks will fetch it, while the others wait"
            yield Problem(what, where, f"bring it there before: {bring}", refuses=False)
    place, free = host.where.call(there.room, cache)
    if fetched and fetched + _SLACK > free:
        what = f"{free / GIB:.1f} GiB are free below {place}, and models of {fetched / GIB:.1f} GiB would be fetched"
        yield Problem(what, where, "make room, or set hf_cache")


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
