"""What `nemotron doctor` says of a machine with docker, a DGX Spark above all. Reads; the one thing that it starts is a
container that lists the GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import NemotronError
from nemotron_recipes.executors import memory
from nemotron_recipes.executors.docker.control import Docker, Refused, Unreachable, endpoint, how_to_reach
from nemotron_recipes.executors.docker.profile import DockerProfile
from nemotron_recipes.executors.hosts import links
from nemotron_recipes.executors.images import check as image_check
from nemotron_recipes.executors.images.enroot import architecture
from nemotron_recipes.executors.memory import GIB
from nemotron_recipes.executors.remote import there
from nemotron_recipes.executors.remote.transport import HERE, Transport
from nemotron_recipes.spec import Finding

_PRODUCT = Path("/sys/class/dmi/id/product_name")
_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = ("gb10", "dgx spark")  # in the product's name
_GPU_SECONDS = 120.0
_IMAGE_ROOM = 40 * GIB
_MODEL_ROOM = 100 * GIB  # the 30B model is 63 GB, and comes in pieces


def findings(profile: DockerProfile, hf_cache: Path, where: Transport = HERE) -> Iterator[Finding]:
    """Machine, memory, GPU, daemon, image, caches, links to another machine. Unreachable: that one is behind ssh."""
    product = where.call(links.read, str(_PRODUCT))
    yield Finding("machine", "ok", f"{where.call(links.me)['machine']}{', ' + product if product else ''}")
    yield from _memory(profile, product, where)
    driver = where.call(links.read, str(_DRIVER)).splitlines()
    shared = any(name in product.lower() for name in _SHARED_MEMORY)
    none = "none: stages run on the CPU; a GPU's is there when nvidia-smi works"
    yield Finding("GPU driver", "ok" if driver else "problem" if shared else "warning", driver[0] if driver else none)
    if driver:
        yield _cuda(where)
    yield from _daemon(profile, bool(driver), where)
    _, free = where.call(there.room, str(hf_cache))
    said, enough = f"{free / GIB:.0f} GiB free for {hf_cache}", free > _MODEL_ROOM
    said += "" if enough else f": the 30B model wants {_MODEL_ROOM // GIB}; make room, or set hf_cache"
    yield Finding("Hugging Face cache", "ok" if enough else "warning", said)
    for device, interface, up, speed in where.call(links.ports):
        said = f"{interface} is {'up' if up else 'down'}{f', {speed} Mb/s' if up and speed else ''}"
        yield Finding(f"link {device}", "ok" if up else "warning", said)


def _cuda(where: Transport) -> Finding:
    """The newest CUDA that the driver knows: an image with a newer major version does not start on it."""
    said = where.call(there.run, ["nvidia-smi"], _GPU_SECONDS)
    found = re.search(r"CUDA Version:\s*(\d+\.\d+)", said.get("out", ""))
    if found is None:
        words = str(said.get("err") or "").strip() or "nvidia-smi does not say it"
        return Finding("CUDA", "problem", f"not known: {words}")
    return Finding("CUDA", "ok", f"the driver knows {found[1]} and older")


def _memory(profile: DockerProfile, product: str, where: Transport) -> Iterator[Finding]:
    now = where.call(memory.read_memory)
    if now is None:
        yield Finding("memory", "warning", "the kernel does not say how much is left")
        return
    total, available, free = (value / GIB for value in now)
    yield Finding(
        "memory", "ok", f"{available:.1f} of {total:.1f} GiB available, {free:.1f} GiB without the page cache"
    )
    shared = any(name in product.lower() for name in _SHARED_MEMORY)
    if free < available / 2:
        advice = "sync; echo 3 | sudo tee /proc/sys/vm/drop_caches"
        said = f"much of it is page cache, which CUDA does not see as free: before a large model, {advice}"
        yield Finding("page cache", "warning" if shared else "ok", said)
    if profile.memory_stop_gib is not None:
        yield Finding("memory watchdog", "ok", f"runs are stopped below {profile.memory_stop_gib:g} GiB")
    elif shared:
        said = "the GPU shares this memory, and the machine hangs when it is used up: set memory_stop_gib"
        yield Finding("memory watchdog", "problem", said)


def _daemon(profile: DockerProfile, gpu: bool, where: Transport) -> Iterator[Finding]:
    try:
        docker = Docker(endpoint(profile.docker_host, where), where)
        info = docker.info()
        if docker.is_podman():
            yield Finding("docker", "problem", f"{docker.host} is Podman's socket, which is refused: docs/docker.md")
            return
        yield Finding("docker", "ok", f"{info['ServerVersion']} at {docker.host}, images in {info['DockerRootDir']}")
        _, free = where.call(there.room, str(info["DockerRootDir"]))
        said = f"{free / GIB:.0f} GiB free for images, which take 10 to 30 GiB each"
        yield Finding("docker's disk", "ok" if free > _IMAGE_ROOM else "warning", said)
        kept = bool(info.get("LiveRestoreEnabled"))
        said = "containers outlive the daemon" if kept else 'set "live-restore": true in /etc/docker/daemon.json'
        yield Finding("docker restarts", "ok" if kept else "warning", said)
        image = docker.image(profile.container_image)
        if image is None:
            for problem in image_check.of_docker(profile.container_image, None, str(info["Architecture"]), "", True):
                yield Finding("image", "problem", f"{problem.what}: {problem.fix}")
            return
        yield Finding("image", *_image(profile, image, info))
        if gpu and profile.gpus != "none":
            yield _gpu_in_docker(docker, profile)
    except Unreachable as error:
        yield Finding("docker", "problem", f"{error} {how_to_reach(error)}")
    except NemotronError as error:
        yield Finding("docker", "problem", str(error))


def _image(profile: DockerProfile, image: dict[str, Any], info: dict[str, Any]) -> tuple[str, str]:
    machine = architecture(info["Architecture"])
    told = dict(line.partition("=")[::2] for line in image["Config"].get("Env") or [])
    cuda = f", CUDA {told['CUDA_VERSION']}" if told.get("CUDA_VERSION") else ""
    fits = image["Architecture"] == machine
    other = "" if fits else f", and this machine is {machine}: choose one for it"
    return ("ok" if fits else "problem"), f"{profile.container_image}: {image['Architecture']}{cuda}{other}"


def _gpu_in_docker(docker: Docker, profile: DockerProfile) -> Finding:
    command = ("run", "--rm", "--pull", "never", "--network", "none", "--gpus", "all", profile.container_image)
    try:
        said = docker.ask(*command, "nvidia-smi", "--list-gpus", seconds=_GPU_SECONDS)
    except (Refused, Unreachable) as error:
        return Finding("GPU in docker", "problem", f"{error}; the NVIDIA container toolkit may be missing")
    return Finding("GPU in docker", "ok", said.strip().replace("\n", ", "))
