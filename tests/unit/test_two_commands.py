"""The two commands' own machinery: the environment tool's stamp and refusals, the Makefile's messages, loud skips."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(venv: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "venv.py", "--venv", venv, "--extra", "trl"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def stamped(venv: Path, **changes: object) -> None:
    tool = load_tool("venv")
    venv.mkdir()
    stamp = {"digest": tool.digest(), "root": str(ROOT), "python": sys.version, "extras": ["test", "trl"]}
    tool.write_stamp(venv, {**stamp, **changes})


def test_a_whole_environment_starts_nothing(tmp_path: Path) -> None:
    # The folder holds a stamp and nothing else: any attempt to use pip or to make an environment would show.
    stamped(tmp_path / "env")
    done = run_tool(tmp_path / "env")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in (tmp_path / "env").iterdir()] == ["nemotron-recipes.json"]


@pytest.mark.parametrize("change", [{"digest": ""}, {"root": "/elsewhere"}, {"python": "3.9"}, {"extras": []}])
def test_what_does_not_fit_is_installed_again(tmp_path: Path, change: dict[str, object], monkeypatch) -> None:
    tool = load_tool("venv")
    asked: list[dict[str, object]] = []
    stamped(tmp_path / "env", **change)
    monkeypatch.setattr(tool, "install", lambda venv, want, have: asked.append(want))
    monkeypatch.setattr(sys, "argv", ["venv.py", "--venv", str(tmp_path / "env"), "--extra", "trl"])
    tool.main()
    assert len(asked) == 1 and "trl" in asked[0]["extras"] and asked[0]["digest"] == tool.digest()


def test_an_interrupted_install_is_not_whole(tmp_path: Path, monkeypatch) -> None:
    tool = load_tool("venv")
    stamped(tmp_path / "env")
    have = tool.read_stamp(tmp_path / "env")
    monkeypatch.setattr(tool, "has_pip", lambda venv: True)
    tool.prepare(tmp_path / "env", {**have, "digest": "new"}, have)
    assert tool.read_stamp(tmp_path / "env")["digest"] == ""


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "env"
    folder.mkdir()
    (folder / "precious").write_text("x")
    done = run_tool(folder)
    assert done.returncode == 2
    assert "was not made by this Makefile" in done.stderr and "VENV=DIR" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("versions", "platform", "expected"),
    [
        ("2.13.0+cpu, 2.13.0, 2.12.0", "linux", "190 MB for torch 2.13.0+cpu"),
        ("2.14.0, 2.13.0, 2.12.0", "linux", "up to 2500 MB for torch 2.13.0 with CUDA"),
        ("2.13.0+cu130, 2.13.0+cpu", "linux", "torch 2.13.0+cu130 with CUDA"),
        ("2.13.0", "darwin", "90 MB for torch 2.13.0"),
        ("12.13.0, 2.13.01", "linux", "pip lists no such version"),
    ],
)
def test_the_build_of_torch_is_announced(
    versions: str, platform: str, expected: str, tmp_path: Path, monkeypatch
) -> None:
    tool = load_tool("venv")
    pip = tmp_path / "bin" / "python"
    pip.parent.mkdir()
    pip.write_text(f"#!/bin/sh\necho 'torch (9.9.9)'\necho 'Available versions: {versions}'\n")
    pip.chmod(0o755)
    (tmp_path / "constraints.txt").write_text("toolz==1.0\ntorch==2.13.0\ntorchx==0.7.0\n")
    monkeypatch.setattr(tool, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(sys, "platform", platform)
    assert expected in tool.describe_torch(tmp_path)


def test_an_old_python_is_refused_by_name(tmp_path: Path) -> None:
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["make", "quickstart", f"PYTHON={old}"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "Python 3.10 or newer is needed" in done.stderr and str(old) in done.stderr


def test_the_lock_keeps_only_the_split_by_python_version() -> None:
    resolved = (
        "click==8.1 ; (python_full_version < '3.15' and sys_platform == 'darwin') or (sys_platform == 'linux')\n"
        "numpy==2.2 ; (python_full_version < '3.11' and sys_platform == 'linux')\n"
        "numpy==2.4 ; (python_full_version >= '3.11' and python_full_version < '3.15' and sys_platform == 'linux')\n"
    )
    assert load_tool("lock").shorten(resolved) == (
        'click==8.1\nnumpy==2.2 ; python_version < "3.11"\nnumpy==2.4 ; python_version >= "3.11"\n'
    )


def test_every_pin_is_exact() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert not [line for line in lines if "==" not in line or "+" in line or "*" in line]


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_a_skip_is_loud_and_fails_in_ci(tmp_path: Path, ci: str, code: int) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_one.py").write_text(
        "import pytest\ndef test_passes(): pass\ndef test_skips(): pytest.skip('no data here')\n"
    )
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        env={**os.environ, "CI": ci, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode != 0) == bool(code), done.stdout
    assert "1 passed" in done.stdout  # the rest runs all the same
    assert "no data here" in done.stdout and "no_such_module" in done.stdout
    assert ("a skip is a failure when CI=true" if ci else "SKIPPED: these tests proved nothing here") in done.stdout


def test_the_stamp_is_json(tmp_path: Path) -> None:
    stamped(tmp_path / "env")
    assert set(json.loads((tmp_path / "env" / "nemotron-recipes.json").read_text())) == {
        "digest", "root", "python", "extras",
    }  # fmt: skip
