"""Import, export and merge against the real Megatron-Bridge and Megatron-Core, on a CPU: weights must come back.

Only Transformer Engine and what asks CUDA for nothing of substance are fakes (tests/helpers/fake_transformer_engine).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.backends import get_backend
from nemotron_recipes.config.schema import ConvertConfig
from nemotron_recipes.rundir import TRACKER
from nemotron_recipes.spec import Artifact, Output, StageSpec
from tests.helpers import real_megatron

ROOT = Path(__file__).parents[2]
HELPER = ROOT / "tests" / "helpers" / "megatron_on_cpu.py"
MODEL = {"path": "ORG/NAME"}


def config(method: str, model: str = "ORG/NAME", **checkpoint: str) -> dict:
    slot = "checkpoint" if method == "import" else "model"
    tree = {"kind": "convert", "method": method, "model": {"path": model}, "checkpoint": checkpoint}
    tree |= {"backend": {"name": "megatron_convert"}, "outputs": {slot: f"{method}ed"}}
    return ConvertConfig.model_validate(tree).model_dump()


@pytest.mark.parametrize(
    ("method", "checkpoint", "message"),
    [
        ("export", {}, "convert export needs the checkpoint to convert"),
        ("merge", {"path": "a"}, "convert merge needs the checkpoint that the adapters were trained on"),
        ("import", {"path": "a"}, "'checkpoint.path' means nothing for convert import"),
        ("export", {"path": "a", "base": "b"}, "'checkpoint.base' means nothing for convert export"),
    ],
)
def test_what_a_conversion_needs(method, checkpoint, message):
    (problem,) = get_backend("megatron_convert").check(config(method, **checkpoint), nproc=1)
    assert problem.what == message and problem.fix


@pytest.fixture(scope="module")
def python() -> Path:
    return real_megatron.python()


def run(python: Path, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, HELPER, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


def convert(python: Path, folder: Path, method: str, model: Path, **checkpoints: Path) -> Path:
    """Plan one conversion, run its worker, and return the content of what it has registered."""
    store = Store(folder / "store")
    inputs = {"model.path": Artifact("path", "model", uri=str(model))}
    inputs |= {f"checkpoint.{n}": Artifact("path", "checkpoint", uri=str(p)) for n, p in checkpoints.items()}
    tree = config(method, str(model), **{name: str(path) for name, path in checkpoints.items()})
    backend = get_backend("megatron_convert")
    slot = backend.makes(tree)
    stage = {"id": "r", "stage": method, "dir": str(folder / method), "store": str(store.root), "fingerprint": method}
    launch = backend.describe(StageSpec(tree, inputs, (Output(slot, f"{method}ed", slot),), stage))
    files = Path(launch.args[1]).parent
    files.mkdir(parents=True)
    for name, text in launch.files.items():
        (files / name).write_text(text)
    run(python, "worker", *launch.args)
    return store.content(store.resolve(f"{method}ed:v1"))


@pytest.mark.long
def test_weights_come_back(python: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    run(python, "model", model)
    imported = convert(python, tmp_path, "import", model)
    assert (imported / TRACKER).read_text().strip() == "0" and (imported / "iter_0000000").is_dir()
    exported = convert(python, tmp_path, "export", model, path=imported)
    assert set(json.loads(run(python, "compare", model, exported)).values()) == {0.0}
    assert (exported / "tokenizer.json").is_file()

    adapters = tmp_path / "adapters"
    run(python, "adapters", imported, model, adapters)
    merged = convert(python, tmp_path, "merge", model, path=adapters / "iter_0000000", base=imported)
    changed = {n for n, d in json.loads(run(python, "compare", model, merged)).items() if d > 0}
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(2)}
    after = json.loads(run(python, "compare", model, merged, adapters / "adapters.pt"))
    assert max(after.values()) < 2e-3  # a rounding of bfloat16


@pytest.mark.long
def test_adapters_are_never_guessed(python: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    run(python, "model", model)
    imported = convert(python, tmp_path, "import", model)
    with pytest.raises(AssertionError, match="holds no adapters"):
        convert(python, tmp_path, "merge", model, path=imported, base=imported)
