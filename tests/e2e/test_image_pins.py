"""Whether everything that our images install exists as wheels for their Python, on both architectures. Needs a package
index; says so where there is none. Whether NVIDIA's base image takes them is not proved by this."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_recipes import image_list

pytestmark = [pytest.mark.e2e, pytest.mark.long]
PYTHON = "3.12"  # of nvcr.io/nvidia/pytorch:25.11-py3
GLIBC = (39, 34, 28, 27, 24, 17)  # that image's is 2.39


def resolved(folder: Path, architecture: str, *requirements: str) -> list[str]:
    """Names of the wheels that pip would take, without their dependencies; [] where it finds none for one of them."""
    report = folder / f"{architecture}.json"
    report.unlink(missing_ok=True)
    platforms = [f"manylinux_2_{minor}_{architecture}" for minor in GLIBC] + [f"manylinux2014_{architecture}"]
    argv = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"]
    argv += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", f"--report={report}"]
    argv += [f"--target={folder / architecture}", *(f"--platform={name}" for name in platforms), *requirements]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        print(done.stderr[-3000:])
        return []
    return [str(each["metadata"]["name"]) for each in json.loads(report.read_text())["install"]]


@pytest.mark.parametrize("architecture", ["aarch64", "x86_64"])
def test_what_our_images_install_is_there(architecture: str, tmp_path: Path) -> None:
    if not resolved(tmp_path, architecture, "packaging"):
        pytest.skip("no package index answers here")
    recipes = [file.read_text(encoding="utf-8") for file in sorted(image_list.folder().glob("*.Dockerfile"))]
    wanted = [text for recipe in recipes for text in re.findall(r'"([A-Za-z0-9_-]+[=><][^"]*)"', recipe)]
    assert len(wanted) > 20
    assert len(resolved(tmp_path, architecture, *wanted)) == len(wanted)
    assert resolved(tmp_path, architecture, "unsloth==0.0.1") == [], "a pin that does not exist is seen"
