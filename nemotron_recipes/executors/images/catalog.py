"""The images that stages run in: what is known of them, what the registry says now, and a squashfs file of one.

Facts stand in containers/images.toml. A file that was imported carries the digest in its name, so that a tag that has
moved never hides behind an old file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemotron_recipes import image_list
from nemotron_recipes.errors import JobFailed, Problem, UserError, nearest
from nemotron_recipes.executors.images import importing, lock
from nemotron_recipes.executors.images.enroot import Reference, Unusable, parse_reference
from nemotron_recipes.executors.images.registry import Found
from nemotron_recipes.executors.remote import transport
from nemotron_recipes.spec import Tree

_FIELDS = ("reference", "backends", "stages", "digest", "architectures", "versions", "nearest", "recipe", "sources")


@dataclass(frozen=True)
class Image:
    """An entry of images.toml; see there."""

    reference: str
    backends: tuple[str, ...]
    stages: tuple[str, ...]
    digest: str = ""
    architectures: tuple[str, ...] = ()
    versions: Tree = field(default_factory=dict)
    nearest: Tree = field(default_factory=dict)
    recipe: str = ""
    sources: Tree = field(default_factory=dict)
    digest_from: str = "containers/images.toml"  # or the project's own file (lock.py)


def known_images(file: Path | None = None) -> tuple[Image, ...]:
    """Every entry. UserError: the file holds something else."""
    file = file or image_list.folder() / "images.toml"
    try:
        return tuple(_image(entry, file) for entry in image_list.entries(file))
    except (ValueError, KeyError, TypeError, Unusable) as error:  # TOMLDecodeError is a ValueError
        raise UserError(Problem(f"the list of images can't be read: {error}", str(file))) from None


def _image(entry: Tree, file: Path) -> Image:
    for key in entry:
        if key not in _FIELDS:
            raise UserError(Problem(f"unknown key '{key}'", str(file), nearest(key, _FIELDS)))
    parse_reference(entry["reference"])
    fields: Tree = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Image(**fields)


def find(written: str, images: Sequence[Image]) -> Image | None:
    """The entry of that image and tag, in whatever form it is written."""
    wanted = reference(written)
    for image in images:
        known = parse_reference(image.reference)
        if (known.registry, known.repository, known.tag) == (wanted.registry, wanted.repository, wanted.tag):
            return image
    return None


def listed(written: str) -> Image | None:
    """The same of all that is known of it: with the digest that the project keeps, where the list has none."""
    found, name = find(written, known_images()), lock.name_of(reference(written))
    return _kept(found or Image(name, (), ()), lock.digests()) or found


def all_known() -> list[Image]:
    """Every entry of the list as `listed` has it, then what the project alone keeps a digest of."""
    digests, entries = lock.digests(), known_images()
    names = {lock.name_of(reference(image.reference)) for image in entries}
    others = [Image(name, (), ()) for name in sorted(digests) if name not in names]
    return [_kept(image, digests) or image for image in (*entries, *others)]


def _kept(image: Image, digests: Mapping[str, str]) -> Image | None:
    """The image with the digest that the project keeps; None where the list has one, or neither has."""
    kept = "" if image.digest else digests.get(lock.name_of(reference(image.reference)), "")
    return replace(image, digest=kept, digest_from=lock.NAME) if kept else None


def find_or_none(written: str, images: Sequence[Image]) -> Image | None:
    """The same; None as well for what names no image of a registry: a file, an id, one of the node's own daemon."""
    try:
        return find(written, images)
    except UserError:
        return None


def reference(written: str) -> Reference:
    """UserError where it is none."""
    try:
        return parse_reference(written)
    except Unusable as error:
        raise UserError(Problem(error.what, "image", error.fix)) from None


def differences(image: Image, found: Found, architecture: str | None) -> Iterator[Problem]:
    """Where the registry, the file, and the machine (amd64, arm64) disagree."""
    name = image.reference
    if image.digest and image.digest != found.digest:
        what = f"the tag has moved: {name} was {image.digest}, and is {found.digest} now"
        fix = f"use {name}@{image.digest}, or look at what changed and pin anew"
        accept = "" if image.digest_from != lock.NAME else f": nemotron images check --accept {name}"
        yield Problem(what, image.digest_from, f"{fix}{accept}")
    gone = sorted(set(image.architectures) - set(found.architectures))
    if gone:
        yield Problem(f"{name} is not there for {', '.join(gone)}", "images.toml", "mend architectures")
    if architecture and architecture not in found.architectures:
        what = f"{name} is for {', '.join(found.architectures)}, not for {architecture}"
        yield Problem(what, fix="choose one for this machine")


def squashfs_name(image: Reference, digest: str, architecture: str) -> str:
    """`nvidia+nemo+26.04.00@sha256-<hex>.arm64.sqsh`"""
    return f"{_stem(image)}@{digest.replace(':', '-')}.{architecture}.sqsh"


@dataclass(frozen=True)
class Named:
    """What the name of an imported file tells."""

    stem: str
    digest: str
    architecture: str  # "": it was imported before files told it

    def is_of(self, image: Reference) -> bool:
        """Whether it was made of that image and tag; the registry is not in the name."""
        return self.stem == _stem(image)


def read_squashfs_name(file: str) -> Named | None:
    """The inverse of `squashfs_name`; None for other names."""
    found = re.fullmatch(r"(.+)@(sha256)-([0-9a-f]{64})(?:\.([a-z0-9]+))?\.sqsh", os.path.basename(file))
    return Named(found[1], f"{found[2]}:{found[3]}", found[4] or "") if found else None


def _stem(image: Reference) -> str:
    return image.repository.replace("/", "+") + (f"+{image.tag}" if image.tag else "")


def import_squashfs(image: Reference, digest: str, architecture: str, target: Path, before: Sequence[str] = ()) -> Path:
    """The image as a squashfs file in the folder `target`, on the machine that is spoken to (importing.py).

    UserError: `target` can't be written, or there is no enroot; JobFailed: enroot's own words.
    """
    final = target / squashfs_name(image, digest, architecture)
    pinned = Reference(image.registry, image.repository, "", digest, image.user)
    failed = transport.call(importing.bring, pinned.for_pyxis, architecture, str(final), list(before))
    if failed:
        raise JobFailed(failed)
    return final


def pull(pinned: str) -> None:
    """Into this machine's docker. JobFailed: docker's own words."""
    try:
        done = subprocess.run(("docker", "pull", pinned), stdout=sys.stderr, check=False)
    except FileNotFoundError:
        what = "there is no docker command here"
        raise UserError(Problem(what, fix="install docker: https://docs.docker.com/engine/install")) from None
    if done.returncode:
        raise JobFailed(f"docker pull {pinned} ended with {done.returncode}")
