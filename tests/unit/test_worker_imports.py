"""Workers of NVIDIA's packages begin with Python's library and PyYAML alone: an image has no Hydra, no NeMo-Run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
# packs.py is loaded by AutoModel itself, where numpy is.
LOOK = """
import importlib, os, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {"yaml", "_yaml", "nemotron_recipes", *sys.stdlib_module_names}:
            raise ModuleNotFoundError(f"{name} is not in every image", name=name)

sys.meta_path.insert(0, Refuse())
import nemotron_recipes
package = os.path.join(os.path.dirname(nemotron_recipes.__file__), "worker")
names = ["runtime", "part"]
for worker in ("megatron_bridge", "megatron_convert", "automodel", "nemo_rl", "nemo_rl_convert"):
    files = sorted(os.listdir(os.path.join(package, worker)))
    names += [f"{worker}.{file[:-3]}" for file in files if file.endswith(".py") and file != "packs.py"]
for name in names:
    importlib.import_module(f"nemotron_recipes.worker.{name}")
print(len(names))
"""


def test_no_worker_needs_more_than_python_to_begin() -> None:
    places = os.pathsep.join([str(ROOT), str(Path(yaml.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-S", "-c", LOOK], env={"PYTHONPATH": places}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
