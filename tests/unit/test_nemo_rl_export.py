"""Weights as NeMo-RL's policies save them become a Hugging Face folder: real checkpoints of PyTorch, on a CPU."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import JobFailed, UserError
from nemotron_recipes.rundir import TRACKER, StageDir
from nemotron_recipes.spec import Artifact, Output
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.nemo_rl_convert import stage, weights

Weights = dict[str, torch.Tensor]
ROUTER = "model.layers.0.router.correction"  # a weight that the base keeps in 32 bits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that training began from, in BF16 but for one weight."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(3)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **shape)).to(torch.bfloat16)
    made.save_pretrained(folder)
    found = load_file(folder / "model.safetensors") | {ROUTER: torch.zeros(4, dtype=torch.float32)}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def trained(model: Path) -> Weights:
    """What DTensor holds after training: the same names in 32 bits, other values."""
    torch.manual_seed(5)
    return {name: torch.randn(tensor.shape) for name, tensor in load_file(model / "model.safetensors").items()}


def saved(folder: Path, trained: Weights, layout: str) -> Path:
    """A checkpoint of NeMo-RL as an artifact: iter_0000004 and the tracker."""
    step = folder / "checkpoint" / "iter_0000004"
    place = step / "policy" / "weights"
    (step / "policy" / "tokenizer").mkdir(parents=True)
    (step / "policy" / "tokenizer" / "tokenizer.json").write_text('{"trained": true}')
    (step / "config.yaml").write_text("{}")
    (folder / "checkpoint" / TRACKER).write_text("4\n")
    if layout == "v1":
        dcp.save({"model": trained}, checkpoint_id=str(place), no_dist=True)
    elif layout == "v2, torch_save":
        dcp.save(trained, checkpoint_id=str(place / "model"), no_dist=True)
    elif layout == "v2, safetensors":
        writer = dcp.HuggingFaceStorageWriter(str(place / "model"), save_distributed=True)
        dcp.save(trained, storage_writer=writer, no_dist=True)
        (place / "model" / ".hf_metadata").mkdir()
        told = {"model_type": "llama", "torch_dtype": "float32", "trained": True}
        (place / "model" / ".hf_metadata" / "config.json").write_text(json.dumps(told))
    else:
        (place / "iter_0000000").mkdir(parents=True)
    return folder / "checkpoint"


def export(folder: Path, model: Path, checkpoint: Path, **config: Any) -> Path:
    outputs = {"model": Output("model", "made", "model")}
    context = Context(0, 1, 0, 1, StageDir(folder / "stage"), {"id": "r"}, Store(folder / "store"), outputs)
    for key, kind, path in (("model.path", "model", model), ("checkpoint.path", "checkpoint", checkpoint)):
        context.artifacts[key], context.inputs[key] = Artifact("path", kind, uri=str(path)), path
    stage.run({"method": "export", "dtype": "bfloat16", "strict": True, "converter": [], **config}, context)
    return context.output("model")


@pytest.mark.parametrize("layout", ["v1", "v2, torch_save", "v2, safetensors"])
def test_dtensors_shards(
    layout: str, model: Path, trained: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", 2000)
    output = export(tmp_path, model, saved(tmp_path, trained, layout))
    files = sorted(output.glob("model-*.safetensors"))
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {*index["weight_map"].values()} == {file.name for file in files}
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert found.keys() == trained.keys() == index["weight_map"].keys()
    for name, tensor in found.items():
        wanted = torch.float32 if name == ROUTER else torch.bfloat16
        assert tensor.dtype == wanted and torch.equal(tensor, trained[name].to(wanted)), name
    config = json.loads((output / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} <= {"bfloat16", None}
    assert config.get("trained") is (True if layout == "v2, safetensors" else None)
    assert json.loads((output / "tokenizer.json").read_text()) == {"trained": True}


def test_transformers_loads_it(model: Path, trained: Weights, tmp_path: Path) -> None:
    del trained[ROUTER]
    output = export(tmp_path, model, saved(tmp_path, trained, "v1"), strict=False)
    assert sorted(path.name for path in output.glob("model*")) == ["model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, trained["lm_head.weight"].bfloat16())


def test_a_weight_that_is_not_there_ends_it(model: Path, trained: Weights, tmp_path: Path) -> None:
    del trained["lm_head.weight"]
    with pytest.raises(JobFailed, match=r"1 weight\(s\) of .* not in the checkpoint: lm_head.weight; .*strict=false"):
        export(tmp_path, model, saved(tmp_path, trained, "v1"))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(model / "config.json", bare / "config.json")
    with pytest.raises(JobFailed, match=r"holds no safetensors to compare with; .*strict=false"):
        export(tmp_path / "again", bare, tmp_path / "checkpoint")


FAKE_CONVERTER = """\
import json, sys, numpy
from pathlib import Path
from safetensors.numpy import save_file
told = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = Path(told["hf-ckpt-path"])
assert not folder.exists() and Path(told["megatron-ckpt-path"]).name == "iter_0000000"
folder.mkdir()
given = json.loads(Path("weights.json").read_text())
made = {name: numpy.array(values, numpy.float32) for name, values in given.items()}
save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
(folder / "config.json").write_text(json.dumps({"words": sys.argv[1:]}))
"""


def test_megatrons_checkpoint_goes_through_nemo_rls_converter(
    model: Path, trained: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "nemo-rl"
    source.mkdir()
    (source / "convert.py").write_text(FAKE_CONVERTER)
    (source / "weights.json").write_text(json.dumps({name: tensor.tolist() for name, tensor in trained.items()}))
    monkeypatch.setattr(stage, "source_folder", lambda: source)
    checkpoint = saved(tmp_path, trained, "megatron")
    output = export(tmp_path, model, checkpoint, converter=[sys.executable, "convert.py"])
    found = load_file(output / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], trained["lm_head.weight"].bfloat16())
    words = json.loads((output / "config.json").read_text())["words"]
    assert words[:2] == [f"--config={checkpoint}/iter_0000004/config.yaml", f"--hf-model-name={model}"]
    assert not (tmp_path / "stage" / "exported").exists(), "the model lies there twice"
    with pytest.raises(JobFailed, match="NeMo-RL's converter ended with 3"):
        export(tmp_path / "again", model, checkpoint, converter=[sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="there is no no-such-uv here"):
        export(tmp_path / "third", model, checkpoint, converter=["no-such-uv"])


def test_what_cannot_be_exported_says_why(model: Path, trained: Weights, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, trained, "megatron")
    folder = checkpoint / "iter_0000004" / "policy" / "weights" / "iter_0000000"
    (folder / "run_config.yaml").write_text("peft: {_target_: megatron.bridge.peft.lora.LoRA, dim: 8}\n")
    with pytest.raises(UserError, match="holds LoRA adapters, not a whole model"):
        export(tmp_path, model, checkpoint)
    folder.joinpath("run_config.yaml").unlink()
    folder.rmdir()
    with pytest.raises(UserError, match="holds no weights of NeMo-RL"):
        export(tmp_path / "again", model, checkpoint)
    with pytest.raises(UserError, match="no whole checkpoint at"):
        export(tmp_path / "third", model, tmp_path)
