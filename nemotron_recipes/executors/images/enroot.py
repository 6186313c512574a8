"""What Pyxis and enroot take for an image and for a mount. Pure: no path is looked at.

An image is the path of a squashfs file, or [USER@][REGISTRY#]IMAGE[:TAG], which Pyxis hands to `enroot import`
(https://github.com/NVIDIA/pyxis, https://github.com/NVIDIA/enroot/blob/master/doc/cmd/import.md). enroot before 4.1
takes `nvcr.io/nvidia/nemo:TAG` for a repository of Docker Hub, so the registry is always set off by `#`; and before 4.0
it refuses `IMAGE@sha256:...`, while `IMAGE:sha256:...` asks every version since 3.0.1 for just that digest (docker.sh).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SQUASHFS = (".sqsh", ".sqfs", ".squashfs")

# Mount options that enroot-mount knows (bin/enroot-mount.c), less those that move or detach what is mounted elsewhere.
MOUNT_OPTIONS = {
    *("ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync", "mand", "nomand"),
    *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
    *("lazytime", "nolazytime", "iversion", "noiversion", "bind", "rbind", "remount", "silent", "loud", "nofail"),
    *("private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable", "defaults"),
    *("x-create=auto", "x-create=dir", "x-create=file"),
}

_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_REPOSITORY = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_REGISTRY = r"[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]+)?"
_DIGEST = r"sha256:[0-9a-f]{64}"


class Unusable(ValueError):
    """Neither Pyxis nor enroot would take it as it was meant; `fix` says what to write instead."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass(frozen=True)
class Mount:
    """SOURCE:TARGET[:OPTIONS]. `source`: a path on the node, or "tmpfs"."""

    source: str
    target: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join((self.source, self.target, *(["+".join(self.options)] if self.options else [])))


@dataclass(frozen=True)
class Reference:
    """An image in a registry. registry: "" is Docker Hub; digest: "sha256:..." or ""; user: whom the registry asks."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""
    user: str = ""

    @property
    def for_pyxis(self) -> str:
        """As Pyxis and every enroot take it: a digest stands in the place of the tag, which would say nothing more."""
        user, registry = self.user and f"{self.user}@", self.registry and f"{self.registry}#"
        version = f":{self.digest}" if self.digest else self.version
        return f"{user}{registry}{self.repository}{version}"

    @property
    def for_docker(self) -> str:
        """As docker takes it, with the registry in full."""
        return f"{self.registry or _HUB[0]}/{self.repository}{self.version}"

    @property
    def version(self) -> str:
        """`:TAG@DIGEST`, as far as they are given."""
        return (self.tag and f":{self.tag}") + (self.digest and f"@{self.digest}")


def image_for_pyxis(written: str) -> str:
    """An image as `--container-image` takes it, on every version of enroot. Unusable: it could mean nothing there."""
    if not written or written != written.strip() or any(ord(character) < 32 for character in written):
        raise Unusable(f"{written!r} is no image", "write /PATH/IMAGE.sqsh or REGISTRY/IMAGE:TAG")
    if written.startswith("/"):
        if written.endswith("/"):
            raise Unusable(f"{written!r} is a folder", "name the squashfs file that `enroot import -o` made")
        return written
    scheme, separator, rest = written.rpartition("://")
    if separator and scheme == "dockerd":
        return written  # an image of the node's own docker daemon: there are no registries
    if separator and scheme != "docker":
        raise Unusable(f"Pyxis has no images from {scheme}://", "write /PATH/IMAGE.sqsh or REGISTRY/IMAGE:TAG")
    if rest.startswith((".", "~")) or rest.endswith(SQUASHFS):
        raise Unusable(f"{written!r} is a relative path, and jobs run in folders of their own", "write the full path")
    return parse_reference(written).for_pyxis


def parse_reference(written: str) -> Reference:
    """An image in a registry, in any of the forms that docker, enroot and Pyxis take. Unusable: it is none."""
    rest = written.removeprefix("docker://")
    body, at, digest = re.sub(rf":({_DIGEST})$", r"@\1", rest).partition("@sha256:")
    digest = f"{at}{digest}"
    user, at, body = body.rpartition("@")
    if ":" in user and "/" not in user:  # not shown: it may be one
        raise Unusable("an image is named with a password", "leave it out: docker login, or enroot's .credentials")
    registry, separator, repository = body.partition("#")
    if not separator:
        registry, separator, repository = body.partition("/")
        # As docker tells a registry from a part of the repository's name.
        if not separator or not (registry == "localhost" or re.search(r"[.:]", registry)):
            registry, repository = "", body
    registry = registry.lower()
    if registry in _HUB:  # older versions of enroot know it by no name
        registry = ""
    found = re.fullmatch(rf"({_REPOSITORY})(?::({_TAG}))?", repository)
    if (
        not found
        or "/" in user
        or not re.fullmatch(rf"(?:@{_DIGEST})?", digest)
        or (registry and not re.fullmatch(_REGISTRY, registry))
    ):
        hint = "; a repository's name is in lower case" if repository.lower() != repository else ""
        raise Unusable(f"{written!r} is no image", f"write /PATH/IMAGE.sqsh or REGISTRY/IMAGE:TAG{hint}")
    return Reference(registry, found[1], found[2] or "", digest.removeprefix("@"), user)


def architecture(machine: str) -> str:
    """What images call it: they have Go's words (amd64, arm64), kernels and Slurm their own (x86_64, aarch64)."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine.lower(), machine.lower())


def parse_mount(written: str) -> Mount:
    """A mount as `--container-mounts` takes it. Unusable: Pyxis would refuse it, or cut it in two."""
    form = "SOURCE:TARGET[:OPTION+OPTION]"
    if "," in written:
        raise Unusable(f"{written!r} holds a comma, at which Pyxis begins another mount", f"{form}; options go with +")
    source, *more = written.split(":")
    target = more[0] if more else source
    if len(more) > 2 or not source or not target:
        raise Unusable(f"{written!r} is no mount", form)
    if not source.startswith("/") and source != "tmpfs":
        raise Unusable(f"{written!r} does not start with a full path", f"{form}, both from / on")
    if not target.startswith("/"):
        raise Unusable(f"{written!r} has no full path in the container", f"{form}, both from / on")
    options = tuple(more[1].split("+")) if len(more) == 2 else ()
    unknown = [option for option in options if option not in MOUNT_OPTIONS and not re.match(r"[a-z]+=", option)]
    if unknown:
        raise Unusable(f"{written!r} has the option {unknown[0]!r}, which enroot does not know", "ro, rw, nosuid, ...")
    return Mount(source, target, options)
