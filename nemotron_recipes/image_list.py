"""What is known of the images that stages run in: the entries of containers/images.toml, as they stand there."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from nemotron_recipes.spec import Tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def folder() -> Path:
    """`containers/` as installed with the package, or the checkout's."""
    package = Path(__file__).resolve().parent
    installed = package / "containers"
    return installed if installed.is_dir() else package.parent / "containers"


def entries(file: Path) -> list[Tree]:
    """Every entry of a list of images. KeyError, TypeError, tomllib.TOMLDecodeError: it is none."""
    return list(tomllib.loads(file.read_text(encoding="utf-8"))["image"])


@cache
def versions() -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Image -> (package -> the version in it, package -> the version that it is taken for where nobody states one)."""
    found = entries(folder() / "images.toml")
    return {entry["reference"]: (entry.get("versions", {}), entry.get("nearest", {})) for entry in found}


def versions_in(image: str) -> tuple[dict[str, str], dict[str, str]]:
    """As `versions`, of an image by its reference, or by the squashfs file that enroot or `nemotron images import` have
    named after it; two empty ones where it is not listed."""
    name = image.rpartition("/")[2]
    if name.endswith(".sqsh"):
        stem = name.removesuffix(".sqsh").partition("@")[0]
        found = [told for listed, told in versions().items() if _file_stem(listed) == stem]
        return found[0] if found else ({}, {})
    return versions().get(plain(image), ({}, {}))


def _file_stem(reference: str) -> str:
    """`nvcr.io/nvidia/nemo:26.04.00` -> `nvidia+nemo+26.04.00`."""
    return reference.partition("/")[2].replace("/", "+").replace(":", "+")


def plain(reference: str) -> str:
    """REGISTRY/NAME:TAG, however Pyxis, enroot or docker would have it written."""
    return reference.removeprefix("docker://").replace("#", "/").partition("@")[0]
