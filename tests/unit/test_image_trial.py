"""What is asked of an image before anything is queued, and what its answer means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_recipes import image_list
from nemotron_recipes.errors import Problem
from nemotron_recipes.executors.images import trial
from nemotron_recipes.executors.images.trial import Need

BROKEN = {
    "whole/__init__.py": "import os\nprint('nemotron-trial is a word that anybody may print')\nfound = 1\n",
    "examples/run.py": "",
    "half/__init__.py": "import whole\nimport no_such_library\n",
    "leaves/__init__.py": "raise SystemExit(0)\n",
    "crashes/__init__.py": "import os, signal\nos.kill(os.getpid(), signal.SIGABRT)\n",
    "whole-1.5.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: whole\nVersion: 1.5.2+local.9\n",
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """What would be an image: a folder with packages, most of them broken in a way of their own."""
    for name, text in BROKEN.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "packages"


def tried(image: Path, need: Need, name: str = "r.io/team/image:1", cuda: str = "") -> list[Problem]:
    argv = [sys.executable, *trial.arguments(name, need, gpu=False)]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(image), "CUDA_VERSION": cuda}
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=120, check=True)
    found = trial.judged(done.stdout, name, need, "profile")
    assert found is not None
    return [*found]


def test_each_import_that_fails_is_named_with_the_reason(image: Path) -> None:
    names = ("json", "whole:found", "half", "crashes", "leaves", "gone|nowhere", "gone|whole", "whole:lost")
    files = ("whole/../examples/run.py", "whole/../examples/other.py", "gone/file")
    problems = tried(image, Need((*names, *files)))
    assert all(problem.refuses and problem.where == "profile" and problem.fix for problem in problems)
    half, crash, leaves, gone, lost, other, none = (problem.what for problem in problems)
    assert "need half, which image r.io/team/image:1 (Python 3." in half and "no_such_library" in half
    assert "need crashes" in crash and "signal 6 (SIGABRT)" in crash
    assert "need leaves" in leaves and "SystemExit" in leaves
    assert "need gone or nowhere" in gone and "'gone'" in gone and "'nowhere'" in gone
    assert lost.startswith("whole in image r.io/team/image:1") and "has no lost" in lost
    assert "a file of whole's" in other and f"{image}/examples/other.py" in other
    assert "a file of gone's" in none and "No module named 'gone'" in none


def test_versions_are_held_against_the_list_and_the_schema(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_list, "folder", lambda: tmp_path)

    def listed(versions: str) -> None:
        head = '[[image]]\nreference = "r.io/team/image:1"\nbackends = []\nstages = []\n'
        (tmp_path / "images.toml").write_text(f"{head}[image.versions]\n{versions}\n")

    checked = Need(("whole",), (("whole", "1.4.0"), ("not-there", "1")))
    listed('whole = "1.5"\ncuda = "13.1"')
    assert tried(image, checked, cuda="13.1.0.036") == [], (
        "the list is right: planning has said what it was checked against"
    )
    listed('whole = "1.6"\ncuda = "13.2"')
    cuda, moved = sorted(problem.what for problem in tried(image, checked, cuda="13.1.0.036"))
    assert "holds cuda 13.1.0.036; containers/images.toml says 13.2" in cuda
    assert "holds whole 1.5.2+local.9; containers/images.toml says 1.6" in moved
    listed("")
    (other,) = tried(image, checked)
    assert "the recipe's values were checked against 1.4.0" in other.what and not other.refuses
    digest = f"sha256-{'0' * 64}"
    listed('whole = "1.6"')
    (of_file,) = tried(image, checked, f"/images/team+image+1@{digest}.arm64.sqsh")
    assert "says 1.6" in of_file.what, "a file's name tells which image it is of"


def test_a_longer_version_is_not_another_one() -> None:
    assert trial.agree("0.6", "0.6.2") and trial.agree("2.14", "2.14+71bbefb") and trial.agree("0.4.0", "0.4.0rc1")
    assert not trial.agree("0.6", "0.5.9") and not trial.agree("2.16", "2.1.6") and not trial.agree("0.4.0", "0.4")


@pytest.mark.parametrize("said", ["", "no answer", "nemotron-trial {}", "nemotron-trial [1]", "nemotron-trial {"])
def test_something_else_is_no_answer(said: str) -> None:
    assert trial.judged(said, "r.io/image:1", Need(()), "") is None
