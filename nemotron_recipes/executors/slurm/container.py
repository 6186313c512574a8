"""The container of a stage on Slurm: which image, mounts and flags Pyxis gets. Pure, but for `missing_here`."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemotron_recipes.executors.images.enroot import Mount, image_for_pyxis, parse_mount
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.slurm.profile import SlurmProfile
from nemotron_recipes.spec import Plan, StagePlan

HF_HOME = "HF_HOME"
# Without the user's own, nobody has a home in a container: its root is read-only, and libraries keep caches at home
# (Triton's compiled kernels). enroot mounts an empty /tmp that is the user's (conf/mounts/10-system.fstab).
NO_HOME = "/tmp"

# Profile field -> (flag if true, flag if false); unset leaves it to the site.
_SWITCHES = {
    "container_mount_home": ("container-mount-home", "no-container-mount-home"),
    "container_remap_root": ("container-remap-root", "no-container-remap-root"),
    "container_writable": ("container-writable", "container-readonly"),
    "container_entrypoint": ("container-entrypoint", "no-container-entrypoint"),
}


@dataclass(frozen=True)
class Container:
    """What srun is told of it. `written`: the image as the profile has it."""

    image: str
    written: str
    mounts: tuple[Mount, ...]
    flags: tuple[str, ...]  # for srun, beside the image, the mounts, the working folder and the names of variables


def container_of(plan: Plan, stage: StagePlan, profile: SlurmProfile) -> Container | None:
    """None on bare metal. The profile has been checked."""
    if profile.image is None:
        return None
    mounts = tuple(dict.fromkeys(_mounts(plan, stage, profile)))
    return Container(image_for_pyxis(profile.image), profile.image, mounts, flags_of(profile))


def flags_of(profile: SlurmProfile) -> tuple[str, ...]:
    """For srun, beside image and mounts."""
    flags = [f"--container-name={profile.container_name}"] if profile.container_name else []
    for field, (yes, no) in _SWITCHES.items():
        wanted = getattr(profile, field)
        if wanted is not None:
            flags.append(f"--{yes if wanted else no}")
    return tuple(flags)


def hf_home(profile: SlurmProfile) -> str | None:
    """HF_HOME of the stages: the profile's, else the submitter's own, who inherits it to his jobs anyway."""
    named = profile.hf_cache or profile.env.get(HF_HOME)
    if profile.tunnel:  # it is a path of another machine
        return named
    named = named or os.environ.get(HF_HOME)
    return os.path.abspath(os.path.expanduser(named)) if named else None


def home(profile: SlurmProfile) -> dict[str, str]:
    """HOME where nobody has one."""
    return {"HOME": NO_HOME} if profile.image is not None and not profile.container_mount_home else {}


def folders(plan: Plan, profile: SlurmProfile) -> tuple[str, ...]:
    """What stages write to; in a container at the same paths."""
    cache = hf_home(profile)
    return (plan.run_dir, plan.store, *([cache] if cache else []))


def notes(stage: StagePlan, profile: SlurmProfile, container: Container | None) -> tuple[tuple[str, str], ...]:
    """What people should see of it in a plan, beside the script."""
    cache = hf_home(profile)
    lines = [(HF_HOME, cache)] if cache else []
    if container is None:
        return tuple(lines)
    written = "" if container.written == container.image else f"  (written {container.written})"
    lines.insert(0, ("image", f"{container.image}{written}"))
    lines += [("mount", str(mount)) for mount in container.mounts]
    if profile.container_name:
        what = f"where a node has a container {profile.container_name} already, that one is used, and no image"
        lines.append(("note", what))
    if not cache and any(artifact.source == "hub" for artifact in stage.inputs.values()):
        what = "what comes from the hub is fetched anew in every job: set hf_cache to a folder that all nodes see"
        lines.append(("note", what))
    return tuple(lines)


def missing_here(profile: SlurmProfile, run_dir: str) -> Iterator[tuple[str, str]]:
    """(profile field, path) of the image and of mounts that are not there, as far as this machine can know.

    It can where the path would lie on a file system that nodes share: a network's, or that of the run folder. A
    container that is kept by name needs no image any more.
    """
    if profile.image is None:
        return
    image = [("container_image", profile.image)] if profile.image.startswith("/") and not profile.container_name else []
    sources = [("mounts", parse_mount(mount).source) for mount in profile.mounts]
    needed = [*image, *((field, path) for field, path in sources if path != "tmpfs")]
    gone = transport.call(there.missing, [path for _, path in needed], run_dir)
    yield from ((field, path) for field, path in needed if path in gone)


def _mounts(plan: Plan, stage: StagePlan, profile: SlurmProfile) -> Iterator[Mount]:
    """The profile's; then at their own paths what the stage writes to, and read-only what it reads."""
    given = [parse_mount(mount) for mount in profile.mounts]
    yield from given
    written = folders(plan, profile)
    for path in written:
        yield Mount(path, path)
    there = [mount.source for mount in given if mount.source == mount.target]
    inputs = [artifact.uri for artifact in stage.inputs.values() if artifact.source == "path"]
    for path in [*inputs, *([stage.resume_from] if stage.resume_from else [])]:
        folder = _above_wildcards(path)
        if not any(Path(folder).is_relative_to(known) for known in (*there, *written)):
            there.append(folder)
            yield Mount(folder, folder, ("ro",))


def _above_wildcards(path: str) -> str:
    """The path itself, or of a pattern the deepest folder above the first wildcard."""
    if os.path.exists(path):  # a file may be called so
        return path
    found = Path(path)
    while glob.has_magic(str(found)):
        found = found.parent
    return str(found)
