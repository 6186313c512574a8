"""Import, export and merge against the real Megatron-Bridge and Megatron-Core, on a CPU: weights must come back.

Only Transformer Engine and what asks CUDA for nothing of substance are fakes (tests/helpers/fake_transformer_engine).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.backends import get_backend
from nemotron_recipes.config.schema import ConvertConfig, Parallel
from nemotron_recipes.errors import UserError
from nemotron_recipes.rundir import TRACKER
from nemotron_recipes.spec import Artifact, Output, StageSpec
from nemotron_recipes.tiny.model import write_model
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.megatron_convert import stage
from tests.helpers import real_megatron
from tests.helpers.training import ARCH

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


@pytest.mark.parametrize(
    ("sizes", "processes", "message"),
    [
        ({}, 8, "each of 8 processes would hold the whole model"),
        ({"expert_model_parallel_size": 3}, 8, "8 process(es) can't be split into groups of 3"),
        ({"tensor_model_parallel_size": 2}, 1, "1 process(es) can't be split into replicas of 2"),
        ({"context_parallel_size": 2, "expert_model_parallel_size": 8}, 8, "a conversion has no sequences"),
    ],
)
def test_how_a_conversion_is_shared_out(sizes, processes, message):
    tree = {**config("import"), "parallel": Parallel(**sizes).model_dump()}
    (problem,) = get_backend("megatron_convert").check(tree, processes)
    assert message in problem.what and problem.fix


@pytest.mark.parametrize(
    ("fields", "gpus", "ranks", "refused"),
    [
        ({"mamba_num_heads": 64}, 0, 1, "only where a GPU is visible"),
        ({"num_experts": 128}, 0, 1, "only where a GPU is visible"),
        ({"n_routed_experts": 128}, 1, 1, ""),
        ({"num_hidden_layers": 2}, 0, 1, ""),
        ({"num_hidden_layers": 2}, 0, 2, "a GPU for each process: there are 0"),
        ({"n_routed_experts": 128}, 1, 2, "a GPU for each process: there are 1"),
        ({"n_routed_experts": 128}, 2, 2, ""),
    ],
)
def test_what_needs_a_gpu_says_so(
    fields: dict[str, int], gpus: int, ranks: int, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    last = cast(Context, SimpleNamespace(world_size=ranks, local_rank=ranks - 1))
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        stage.require_gpu(tmp_path, last)


@pytest.fixture(scope="module")
def python() -> Path:
    return real_megatron.python()


def run(python: Path, *arguments: object, processes: int = 1) -> str:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [python, *([*torchrun, f"--nproc-per-node={processes}"] if processes > 1 else ()), HELPER]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


def convert(
    python: Path,
    folder: Path,
    method: str,
    model: Path,
    trust: bool = False,
    parallel: dict[str, int] | None = None,
    **checkpoints: Path,
) -> Path:
    """Plan one conversion, run its worker, and return the content of what it has registered."""
    processes = 2 if parallel else 1
    store = Store(folder / "store")
    inputs = {"model.path": Artifact("path", "model", uri=str(model))}
    inputs |= {f"checkpoint.{n}": Artifact("path", "checkpoint", uri=str(p)) for n, p in checkpoints.items()}
    tree = config(method, str(model), **{name: str(path) for name, path in checkpoints.items()})
    tree["backend"]["native"]["trust_remote_code"] = trust
    tree["parallel"] = Parallel(**parallel).model_dump() if parallel else None
    backend = get_backend("megatron_convert")
    assert not backend.check(tree, processes)
    slot = backend.makes(tree)
    place = {"id": "r", "stage": method, "dir": str(folder / method), "store": str(store.root), "fingerprint": method}
    launch = backend.describe(StageSpec(tree, inputs, (Output(slot, f"{method}ed", slot),), place, processes))
    assert launch.launcher == ("torchrun" if parallel else "plain")
    files = Path(launch.args[1]).parent
    files.mkdir(parents=True)
    for name, text in launch.files.items():
        (files / name).write_text(text)
    run(python, "worker", *launch.args, processes=processes)
    return store.content(store.resolve(f"{method}ed:v1"))


TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


@pytest.mark.long
@pytest.mark.parametrize(("first", "then"), [(None, None), (TENSOR, PIPELINE)], ids=["one-process", "two"])
def test_weights_come_back(
    first: dict[str, int] | None, then: dict[str, int] | None, python: Path, tmp_path: Path
) -> None:
    """One process, or two that share out the tensors, then the layers."""
    model = tmp_path / "model"
    run(python, "model", model)
    imported = convert(python, tmp_path, "import", model, parallel=first)
    assert (imported / TRACKER).read_text().strip() == "0" and (imported / "iter_0000000").is_dir()
    exported = convert(python, tmp_path, "export", model, parallel=then, path=imported)
    assert set(json.loads(run(python, "compare", model, exported)).values()) == {0.0}
    assert (exported / "tokenizer.json").is_file()

    adapters = tmp_path / "adapters"
    run(python, "adapters", imported, model, adapters)
    merged = convert(python, tmp_path, "merge", model, parallel=then, path=adapters / "iter_0000000", base=imported)
    changed = {n for n, d in json.loads(run(python, "compare", model, merged)).items() if d > 0}
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(2)}
    after = json.loads(run(python, "compare", model, merged, adapters / "adapters.pt"))
    assert max(after.values()) < 2e-3  # a rounding of bfloat16


# As the hub's repositories of Nemotron bring them; weights are read by their names, no class of theirs computes.
CONFIGURATION = """\
from transformers import PretrainedConfig
class NemotronHConfig(PretrainedConfig):
    model_type = "nemotron_h"
"""
MODELING = """\
from transformers import PreTrainedModel
from .configuration_nemotron_h import NemotronHConfig
class NemotronHForCausalLM(PreTrainedModel):
    config_class = NemotronHConfig
"""


@pytest.mark.long
@pytest.mark.parametrize("parallel", [None, {"expert_model_parallel_size": 2}], ids=["one-process", "experts"])
def test_nemotrons_weights_come_back(parallel: dict[str, int] | None, python: Path, tmp_path: Path) -> None:
    """The tiny Nemotron, with Mamba, attention and experts, as Transformers writes it; its own code comes with it."""
    model = tmp_path / "model"
    write_model(model, ARCH, seed=3)
    told = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}
    classes["AutoModelForCausalLM"] = "modeling_nemotron_h.NemotronHForCausalLM"
    told |= {"hybrid_override_pattern": "M*EM*E", "num_hidden_layers": 6, "auto_map": classes}
    told["time_step_limit"] = [0.0, 1e9]  # the Transformers beside Megatron-Bridge 0.3 can't read an infinity
    (model / "config.json").write_text(json.dumps(told))
    (model / "configuration_nemotron_h.py").write_text(CONFIGURATION)
    (model / "modeling_nemotron_h.py").write_text(MODELING)
    imported = convert(python, tmp_path, "import", model, trust=True, parallel=parallel)
    exported = convert(python, tmp_path, "export", model, trust=True, parallel=parallel, path=imported)
    differences = json.loads(run(python, "compare", model, exported))
    assert set(differences.values()) == {0.0}
    kinds = (
        "mixer.A_log",
        "mixer.conv1d.weight",
        "mixer.experts.7.up_proj.weight",
        "e_score_correction_bias",
        "q_proj",
    )
    assert all(any(kind in name for name in differences) for kind in kinds)


@pytest.mark.long
def test_adapters_are_never_guessed(python: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    run(python, "model", model)
    imported = convert(python, tmp_path, "import", model)
    with pytest.raises(AssertionError, match="holds no adapters"):
        convert(python, tmp_path, "merge", model, path=imported, base=imported)
