"""What is said of a stage's image before anything is queued: is it there, for this machine, and still the one it was?

Four places know something: containers/images.toml, images.lock.json of the project, the registry, and what is on this
machine already. Where a profile names a digest, that is the image, whatever its tag has become, and only its being
there and its architecture are asked for. A problem with `refuses=False` is told, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.images import catalog, registry
from nemotron_recipes.executors.images.enroot import Reference, Unusable, architecture, parse_reference
from nemotron_recipes.executors.images.registry import Found

ANSWER_SECONDS = 5.0  # a registry that takes longer is not waited for: many login nodes have no way to it


def of_docker(written: str, here: dict[str, Any] | None, machine: str, where: str, offline: bool) -> Iterator[Problem]:
    """`here`: what docker says of the image, None where it has none; machine: its architecture, as docker says it."""
    image, wanted = _reference(written), architecture(machine)
    listed = catalog.listed(written) if image else None
    if here is None:
        yield from _not_here(written, image, listed, wanted, where, offline)
        return
    if architecture(str(here["Architecture"])) != wanted:
        what = f"image {written} is for {here['Architecture']}, this machine is {machine}"
        yield Problem(what, where, "choose one for this machine")
    if image is None or image.digest:
        return
    pulled = [told.partition("@")[2] for told in here.get("RepoDigests") or ()]
    if not pulled:  # built or imported here: no registry knows it
        if listed and listed.digest:
            what = f"image {written} was not pulled from its registry, so it may not be the listed {listed.digest}"
            yield Problem(what, where, f"docker pull {_pinned(image, listed.digest)}", refuses=False)
        return
    if listed and listed.digest:
        if listed.digest not in pulled:
            yield _moved(written, listed, pulled[0], where, _pinned(image, listed.digest))
        return
    try:
        found, why = _ask(image, offline)
    except registry.Absent as error:
        found, why = None, error.problems[0].what
    if found and found.digest not in pulled:
        what = f"the tag has moved: {written} is {pulled[0]} here, and {found.digest} in the registry"
        yield Problem(what, where, _pin(image, pulled[0], "keeps the one that is here"), refuses=False)
    else:
        yield _unpinned(written, pulled[0], why, where, _pin(image, pulled[0], "pins the one that is here"))


def of_registry(written: str, machines: Collection[str], where: str, offline: bool) -> Iterator[Problem]:
    """Of an image that the nodes fetch; machines: architectures of the nodes, as far as they are known."""
    image = _reference(written)
    if image is None:
        return
    listed = catalog.listed(written)
    try:
        found, why = _ask(image, offline)
    except registry.Absent as error:
        yield from (Problem(problem.what, where, problem.fix) for problem in error.problems)
        return
    if found:
        yield from _misfit(written, found.architectures, machines, where)
    if image.digest:
        return
    if listed and listed.digest and found and listed.digest != found.digest:
        yield _moved(written, listed, found.digest, where, _pinned(image, listed.digest))
    elif not (listed and listed.digest) or why:
        digest = found.digest if found else listed.digest if listed else ""
        fix = _pin(image, digest, "pins it") if digest else f"nemotron images check {written}"
        yield _unpinned(written, digest, why, where, fix)


def of_squashfs(path: str, whole: bool, machines: Collection[str], where: str) -> Iterator[Problem]:
    """Of a file; whole: as far as this machine can see."""
    if not whole:
        yield Problem(f"{path} is no whole squashfs file", where, "nemotron images import makes whole ones only")
        return
    named = catalog.read_squashfs_name(path)
    if named is None:
        what = f"which image {path} is of, and for which architecture, its name does not tell"
        yield Problem(what, where, "nemotron images import names a file by its image's digest", refuses=False)
        return
    if named.architecture:
        yield from _misfit(path, (named.architecture,), machines, where)
    for listed in catalog.known_images():
        if listed.digest and listed.digest != named.digest and named.is_of(catalog.reference(listed.reference)):
            what = f"{path} is not the {listed.reference} that is listed: that is {listed.digest}"
            fix = f"nemotron images import {_pinned(catalog.reference(listed.reference), listed.digest)}"
            yield Problem(what, where, fix, refuses=False)


def _not_here(
    written: str, image: Reference | None, listed: catalog.Image | None, wanted: str, where: str, offline: bool
) -> Iterator[Problem]:
    """An image that docker does not have; before somebody pulls many GB of the wrong one, its registry is asked."""
    what, fix = f"image {written} is not on this machine", f"docker pull {written}"
    if listed and listed.recipe:
        fix = f"docker build -t {written} -f containers/{listed.recipe} containers"
    elif image and (image.registry or "/" in image.repository):  # else it is a name of this machine, mostly
        fix = f"nemotron images import {written} --docker"
        try:
            found, _ = _ask(image, offline)
        except registry.Absent as error:
            yield from (Problem(f"{what}, and {told.what}", where, told.fix) for told in error.problems)
            return
        if found and wanted not in found.architectures:
            what += f"; in its registry it is for {', '.join(found.architectures)}, not for {wanted}"
            fix = "choose one for this machine"
    yield Problem(what, where, fix)


def _misfit(name: str, has: Collection[str], machines: Collection[str], where: str) -> Iterator[Problem]:
    if machines and not set(has) & set(machines):
        what = f"{name} is for {', '.join(sorted(has))}, and the nodes are {', '.join(sorted(machines))}"
        yield Problem(what, where, "choose an image for these nodes")


def _moved(written: str, listed: catalog.Image, now: str, where: str, pinned: str) -> Problem:
    known = f"{listed.digest_from} has {listed.digest}"
    what = f"{written} is not the image that is listed: {known}, this is {now}"
    return Problem(what, where, f'set container_image = "{pinned}", or look at what changed and pin that one')


def _unpinned(written: str, digest: str, why: str, where: str, fix: str) -> Problem:
    what = f"no digest is known for {written}, so a moved tag would go unseen"
    if why:
        what = f"whether {written} is still the image that it was could not be checked: {why}"
    elif digest:
        what += f"; it is {digest} now"
    return Problem(what, where, fix, refuses=False)


def _pin(image: Reference, digest: str, does: str) -> str:
    return f'container_image = "{_pinned(image, digest)}" {does}'


def _pinned(image: Reference, digest: str) -> str:
    return Reference(image.registry, image.repository, image.tag, digest).for_docker


def _ask(image: Reference, offline: bool) -> tuple[Found | None, str]:
    """(what the registry says, or why it is not known). Absent: it has no such image."""
    if offline:
        return None, "--offline"
    try:
        return registry.look_up(image, seconds=ANSWER_SECONDS), ""
    except registry.Absent:
        raise
    except UserError as error:  # unanswered, or our credentials can't be used: the nodes' may
        return None, error.problems[0].what


def _reference(written: str) -> Reference | None:
    """None for what names no image of a registry: an id, or an image of the node's own daemon."""
    try:
        return parse_reference(written)
    except Unusable:
        return None
