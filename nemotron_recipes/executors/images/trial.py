"""Whether what the stages' workers need is in their image, and loads there: what is asked of the image, and what its
answer means. Executors start the container (docker/trial.py, slurm/trial.py) before anything is queued: it is lost time
to find that out after an hour of data prep, or of waiting for nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_recipes.errors import Problem
from nemotron_recipes.executors.images import catalog, inside
from nemotron_recipes.spec import StagePlan

SECONDS = 600.0  # a cold disk reads some GB


@dataclass(frozen=True)
class Need:
    """What stages that share an image need of it.

    imports    as `spec.Launch.imports` has them
    versions   package -> the version that values were checked against
    """

    imports: tuple[str, ...]
    versions: tuple[tuple[str, str], ...] = ()


def need(stages: Sequence[StagePlan]) -> Need:
    """Of all of them together, in their order."""
    imports = dict.fromkeys(name for stage in stages for name in stage.launch.imports)
    versions = {name: version for stage in stages for name, version in stage.launch.versions.items()}
    return Need(tuple(imports), tuple(versions.items()))


def arguments(image: str, wanted: Need, gpu: bool) -> tuple[str, ...]:
    """What follows the interpreter."""
    packages = [*dict.fromkeys((*dict(wanted.versions), *_listed(image)))]
    text = Path(inside.__file__).read_text(encoding="utf-8")
    return ("-c", text, "gpu" if gpu else "cpu", json.dumps(wanted.imports), json.dumps(packages))


def judged(said: str, image: str, wanted: Need, where: str) -> Iterator[Problem] | None:
    """What a container's output means; None: that is no answer."""
    lines = [line for line in said.splitlines() if line.startswith(inside.MARK)]
    if not lines:
        return None
    try:
        told = json.loads(lines[-1].removeprefix(inside.MARK))
        return _problems(told["failed"], told["versions"], told["python"], image, wanted, where)
    except (ValueError, KeyError, TypeError):
        return None


def _problems(
    failed: list[list[str]], found: dict[str, str], python: str, image: str, wanted: Need, where: str
) -> Iterator[Problem]:
    for name, why in failed:
        module, _, attribute = name.partition(":")
        what = f"the stages need {name.replace('|', ' or ')}, which image {image} (Python {python}) can't import: {why}"
        fix = "choose the image that is made for this backend: nemotron images list"
        if "/" in name:
            what = f"the stages need a file of {name.partition('/')[0]}'s that image {image} lacks: {why}"
        elif attribute and why.startswith("AttributeError"):
            what = f"{module} in image {image} (Python {python}) has no {attribute}, which the stages need"
            fix = "it is of another version than the recipe is for: nemotron images list says which image holds which"
        yield Problem(what, where, fix)
    listed = _listed(image)
    for name, version in found.items():
        stated, checked = listed.get(name), dict(wanted.versions).get(name)
        if stated and not agree(stated, version):
            what = f"image {image} holds {name} {version}; containers/images.toml says {stated}"
            yield Problem(what, where, f"has its tag moved? nemotron images check {image}", refuses=False)
        elif checked and not agree(checked, version) and not stated:
            what = f"image {image} holds {name} {version}; the recipe's values were checked against {checked}"
            fix = "a name that this version does not know ends the stage when it starts, before training"
            yield Problem(what, where, fix, refuses=False)


def agree(stated: str, found: str) -> bool:
    """Whether a version is the one that is stated, as far as that goes: 0.6 is 0.6.2, and 13.1 is 13.1.0.036."""
    numbers = [re.findall(r"\d+", version.partition("+")[0]) for version in (stated, found)]
    return [*map(int, numbers[0])] == [*map(int, numbers[1])][: len(numbers[0])]


def _listed(image: str) -> dict[str, str]:
    """The versions that images.toml states; {} for an image that is not listed, or a file of nobody knows which."""
    known = catalog.known_images()
    named = catalog.read_squashfs_name(image)
    if named is not None:
        found = next((each for each in known if named.is_of(catalog.reference(each.reference))), None)
    else:
        found = catalog.find_or_none(image, known)
    return {name: str(version) for name, version in found.versions.items()} if found else {}
