"""One of NeMo-RL's checkpoints becomes a Hugging Face folder in the model's type: one process, on the CPU.

DPO trains on DTensor, whose shards are read here by PyTorch's own readers; GRPO trains on Megatron, whose checkpoints
NeMo-RL's converter exports, a program of its image. NeMo-RL keeps DTensor's weights in 32 bits whatever `precision` is
(v0.7.0, nemo_rl/models/automodel/setup.py, line 330), so that they are written in the type that was asked for.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.spec import Tree
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.converting import adapters_of, checkpoint_folder, key_of, require_hf_folder
from nemotron_recipes.worker.hub import folder_of
from nemotron_recipes.worker.nemo_rl.stage import source_folder
from nemotron_recipes.worker.nemo_rl_convert.weights import state_type, write_weights

POLICY = ("policy", "weights")  # below a checkpoint: nemo_rl/algorithms/dpo.py and grpo.py
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*")
_OF_A_MODEL = ("config.json", "generation_config.json", "*.py")


def run(config: Tree, context: Context) -> None:
    """Export, and leave the folder as the stage's one output. UserError: a checkpoint that can't be exported."""
    model, checkpoint = folder_of(context, "model.path"), checkpoint_folder(context, "path").resolve()
    weights = checkpoint.joinpath(*POLICY)
    megatron = sorted(weights.glob("iter_*"))
    shards = next((place for place in (weights, weights / "model") if _has_shards(place)), None)
    if not megatron and shards is None:
        what = f"{checkpoint} holds no weights of NeMo-RL: neither Megatron's nor DTensor's in {'/'.join(POLICY)}"
        raise UserError(Problem(what, key_of("path"), "give a checkpoint of the nemo_rl backend"))
    _refuse_adapters(weights, megatron)
    context.event("ready", model=str(model), checkpoints={"path": str(checkpoint)})
    output = context.output("model")
    if megatron:
        _from_megatron(config, model, checkpoint, megatron[-1], context.dir.path / "exported", output)
    else:
        assert shards is not None
        write_weights(shards, model, output, config["dtype"], config["strict"])
        _copy(model, output, _OF_A_MODEL)
        _copy(shards / ".hf_metadata", output, _OF_A_MODEL)  # what training has changed of the config
    _copy(model, output, _TOKENIZER)
    _copy(checkpoint / "policy" / "tokenizer", output, _TOKENIZER)  # the one that it was trained with
    state_type(output / "config.json", config["dtype"])
    require_hf_folder(output, "the export")


def _from_megatron(config: Tree, model: Path, checkpoint: Path, weights: Path, scratch: Path, output: Path) -> None:
    """By NeMo-RL's own program, which needs the part of its image that has Megatron-Core."""
    shutil.rmtree(scratch, ignore_errors=True)  # what an attempt before left
    argv = [*config["converter"], f"--config={checkpoint / 'config.yaml'}", f"--hf-model-name={model}"]
    argv += [f"--megatron-ckpt-path={weights}", f"--hf-ckpt-path={scratch}"]
    argv += [] if config["strict"] else ["--no-strict"]
    print("runs:", *argv, flush=True)
    try:
        done = subprocess.run(argv, cwd=source_folder(), check=False)
    except FileNotFoundError:
        raise UserError(Problem(f"there is no {argv[0]} here", sys.executable, "use an image of NeMo-RL")) from None
    if done.returncode:
        raise JobFailed(f"NeMo-RL's converter ended with {done.returncode}; this log says more")
    require_hf_folder(scratch, "NeMo-RL's converter")
    write_weights(scratch, model, output, config["dtype"], config["strict"])
    _copy(scratch, output, (*_OF_A_MODEL, *_TOKENIZER))
    shutil.rmtree(scratch)


def _has_shards(folder: Path) -> bool:
    return (folder / ".metadata").is_file() or any(folder.glob("*.safetensors"))


def _refuse_adapters(weights: Path, megatron: list[Path]) -> None:
    """UserError: these are adapters, which the base model would have to be added to."""
    if (weights / "model" / "adapter_config.json").is_file() or (megatron and adapters_of(megatron[-1])):
        fix = "merge them with NeMo-RL's examples/converters/convert_lora_to_hf.py"
        raise UserError(Problem(f"{weights} holds LoRA adapters, not a whole model", key_of("path"), fix))


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
