"""A built wheel in a clean environment works from any folder, with the wheel's own recipes and templates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nemotron_recipes"

pytestmark = pytest.mark.e2e


class Installed:
    """The wheel in its own environment, and a folder far from the checkout to work in."""

    def __init__(self, wheel: Path, home: Path, cwd: Path):
        self.wheel, self.home, self.cwd = wheel, home, cwd
        self.python = home / "bin" / "python"
        self.package = Path(sysconfig.get_path("purelib", vars={"base": str(home)})) / "nemotron_recipes"

    def run(self, *argv: str | Path) -> str:
        """Standard output of a command that must succeed. It sees nothing of the checkout or this shell's setup."""
        hidden = ("PYTHON", "NEMOTRON")
        env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        env["PATH"] = f"{self.home / 'bin'}{os.pathsep}{env['PATH']}"
        done = subprocess.run(argv, cwd=self.cwd, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{argv} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def nemotron(self, *argv: str) -> str:
        return self.run(self.home / "bin" / "nemotron", *argv)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    room = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", room, ROOT], check=True
    )
    (wheel,) = room.glob("*.whl")
    home, cwd = room / "env", room / "some where else"
    cwd.mkdir()
    venv.create(home, with_pip=False, symlinks=True)
    installed = Installed(wheel, home, cwd)
    # The dependencies are those of this environment. A path file inside a folder that was added by a path file is not
    # read, so an editable install of the checkout there stays invisible.
    (installed.package.parent / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*pip, "--python", installed.python, "install", "--no-deps", "--no-index", wheel], check=True)
    return installed


def test_it_holds_the_package_and_every_recipe(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    wanted = {f"nemotron_recipes/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    kinds = (".py", ".jinja", ".json", ".yaml", ".typed")
    wanted |= {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.suffix in kinds}
    assert not wanted - names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"nemotron_recipes"}  # no tests, tools or bench


def test_the_code_that_runs_is_the_wheels(installed: Installed) -> None:
    code = "import nemotron_recipes, sys; print(nemotron_recipes.__file__); print(*sys.path, sep='\\n')"
    file, *path = installed.run(installed.python, "-c", code).splitlines()
    assert Path(file) == installed.package / "__init__.py"
    assert str(ROOT) not in path


def test_help_lists_the_wheels_own_recipes(installed: Installed) -> None:
    assert "nano3" in installed.nemotron("--help")
    added = installed.package / "conf" / "recipe" / "nano3" / "sft" / "only_in_this_wheel.yaml"
    added.write_text((added.parent / "tiny.yaml").read_text())
    try:
        text = installed.nemotron("nano3", "sft", "-c", "tiny", "--help")
    finally:
        added.unlink()
    assert "tiny" in text and "only_in_this_wheel" in text


def test_data_prep_runs_as_its_dry_run_said(installed: Installed) -> None:
    plan = json.loads(installed.nemotron("nano3", "data", "prep", "sft", "-c", "tiny", "--dry-run", "--json"))
    assert not list(installed.cwd.iterdir()), "a dry run writes nothing"
    assert str(installed.python) in json.dumps(plan) and str(ROOT) not in json.dumps(plan)

    installed.nemotron("nano3", "data", "prep", "sft", "-c", "tiny")
    (output,) = installed.cwd.iterdir()
    (metadata,) = output.glob("**/metadata.json")
    assert str(ROOT) not in metadata.read_text()
    listed = json.loads(installed.nemotron("artifacts", "list", "--json"))
    assert "nano3-tiny-sft-data" in json.dumps(listed)
