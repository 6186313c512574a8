"""One conversion from its inputs to its output: one process, weights on the CPU, through Megatron-Bridge's AutoBridge.

The calls are those of its own programs: examples/conversion/convert_checkpoints.py and examples/peft/merge_lora.py up
to 0.5, scripts/conversion (device cpu) from 0.6 on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.rundir import TRACKER, latest_checkpoint
from nemotron_recipes.spec import Tree
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.converting import RUN_CONFIG, adapters_of, checkpoint_folder, key_of, require_hf_folder
from nemotron_recipes.worker.hub import folder_of

# What a config.json has where there are layers that Megatron-Core (0.16 to 0.19) builds only where a GPU is visible:
# ssm/mamba_mixer.py wants its random state, transformer/moe/token_dispatcher.py a stream of it.
_NEED_GPU = ("mamba_num_heads", "n_routed_experts", "num_experts", "num_local_experts")
_LORA = ("target_modules", "dim", "alpha", "dropout", "dropout_position")  # what the shape of adapters follows from


def run(config: Tree, context: Context) -> None:
    """Convert, and leave the result as the stage's one output. UserError: a checkpoint that can't be used."""
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    method, model = config["method"], folder_of(context, "model.path")
    require_gpu(model)
    sources = {name: checkpoint_folder(context, name) for name in ("path", "base") if key_of(name) in context.inputs}
    if method == "merge":
        lora_settings(sources["path"])  # before gigabytes are read
    context.event("ready", model=str(model), checkpoints={name: str(path) for name, path in sources.items()})
    if method == "import":
        with temporary_distributed_context(backend="gloo"):
            import_model(model, context.output("checkpoint"), config["dtype"], config["trust_remote_code"])
        context.metadata["format"] = "megatron"
        return
    output = context.output("model")
    with temporary_distributed_context(backend="gloo"):
        if method == "export":
            export_model(model, sources["path"], output, config)
        else:
            merge_adapters(model, sources["base"], sources["path"], output, config)
    require_hf_folder(output, "Megatron-Bridge")


def require_gpu(model: Path) -> None:
    """UserError: this model has layers that can't be built here."""
    import torch

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if any(config.get(name) for name in _NEED_GPU) and not torch.cuda.is_available():
        what = (
            "Megatron-Core builds Mamba layers and experts only where a GPU is visible, even to convert their weights"
        )
        raise UserError(Problem(what, "model.path", "give the stage a GPU: in its profile, gpus_per_node or gpus"))


def import_model(model: Path, output: Path, dtype: str, trust: bool) -> None:
    """Hugging Face folder -> checkpoint root with its tracker file."""
    import torch
    from megatron.bridge import AutoBridge

    AutoBridge.import_ckpt(
        str(model), str(output), torch_dtype=getattr(torch, dtype), device_map="cpu", trust_remote_code=trust
    )
    if latest_checkpoint(output) is None:
        raise JobFailed(f"Megatron-Bridge wrote no whole checkpoint: {output / TRACKER} names none")


def export_model(model: Path, checkpoint: Path, output: Path, config: Tree) -> None:
    """Checkpoint -> Hugging Face folder, with the tokenizer and the config of `model`."""
    bridge = _bridge(model, config)
    loaded = bridge.load_megatron_model(str(checkpoint), wrap_with_ddp=False)
    bridge.save_hf_pretrained(loaded, str(output), show_progress=False, strict=config["strict"])


def merge_adapters(model: Path, base: Path, adapters: Path, output: Path, config: Tree) -> None:
    """Base weights with the adapters added, as a Hugging Face folder. JobFailed: not every adapter was found."""
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.checkpointing import (
        _generate_model_state_dict,
        apply_peft_adapter_filter_to_state_dict,
    )
    from megatron.core import dist_checkpointing

    lora = LoRA(**lora_settings(adapters))
    bridge = _bridge(model, config)
    loaded = lora(bridge.load_megatron_model(str(base), wrap_with_ddp=False), training=False)
    wanted = apply_peft_adapter_filter_to_state_dict(_generate_model_state_dict(loaded, {}), lora)
    found = dist_checkpointing.load(wanted, str(adapters))
    section = found["model"] if "model" in found else next(found[key] for key in found if key.startswith("model"))
    names = {n for n in loaded[0].state_dict() if ".adapter." in n and not n.endswith("_extra_state")}
    if not names or (missing := names - set(section)):
        raise JobFailed(f"{adapters} lacks adapters: {', '.join(sorted(missing)[:5]) if names else 'it has none'}")
    loaded[0].load_state_dict(section, strict=False)
    bridge.save_hf_pretrained(
        loaded, str(output), show_progress=False, strict=config["strict"], merge_adapter_weights=True
    )


def lora_settings(checkpoint: Path) -> Tree:
    """What the adapters of a checkpoint were made with. UserError: it says nothing of adapters."""
    said = adapters_of(checkpoint)
    if not said:
        what = f"{checkpoint} holds no adapters: its {RUN_CONFIG} has no section peft"
        raise UserError(Problem(what, key_of("path"), "give a checkpoint of LoRA, or use convert export"))
    if not str(said.get("_target_", "")).endswith(".LoRA"):
        raise UserError(Problem(f"{checkpoint} holds adapters of another kind: {said.get('_target_')}", key_of("path")))
    return {name: said[name] for name in _LORA if name in said}


def _bridge(model: Path, config: Tree) -> Any:
    import torch
    from megatron.bridge import AutoBridge

    kind = getattr(torch, config["dtype"])
    return AutoBridge.from_hf_pretrained(str(model), torch_dtype=kind, trust_remote_code=config["trust_remote_code"])
