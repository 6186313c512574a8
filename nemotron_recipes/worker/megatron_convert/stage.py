"""One conversion from its inputs to its output, through Megatron-Bridge's AutoBridge.

The calls are those of its own programs, for one process with the weights on the CPU, and for several that share the
model out; docs/backends.md names the programs of each version.
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
from nemotron_recipes.worker.megatron_bridge.config import repair_yarn
from nemotron_recipes.worker.megatron_convert.ranks import from_all, joined, layout_of, output_of

# What a config.json has where there are layers that Megatron-Core (0.16 to 0.19) builds only where a GPU is visible:
# ssm/mamba_mixer.py wants its random state, transformer/moe/token_dispatcher.py a stream of it.
_NEED_GPU = ("mamba_num_heads", "n_routed_experts", "num_experts", "num_local_experts")
_LORA = ("target_modules", "dim", "alpha", "dropout", "dropout_position")  # what the shape of adapters follows from


def run(config: Tree, context: Context) -> None:
    """Convert, and leave the result as the stage's one output. UserError: a checkpoint that can't be used."""
    method, model = config["method"], folder_of(context, "model.path")
    require_gpu(model, context)
    sources = {name: checkpoint_folder(context, name) for name in ("path", "base") if key_of(name) in context.inputs}
    if method == "merge":
        lora_settings(sources["path"])  # before gigabytes are read
    context.event("ready", model=str(model), checkpoints={name: str(path) for name, path in sources.items()})
    output = Path()
    repair_imports()
    with joined(context):
        output = output_of(context, "checkpoint" if method == "import" else "model")
        if method == "import":
            import_model(model, output, config)
        elif method == "export":
            export_model(model, sources["path"], output, config)
        else:
            merge_adapters(model, sources["base"], sources["path"], output, config)
    if not context.is_main:
        return
    if method == "import":
        context.metadata["format"] = "megatron"
        if latest_checkpoint(output) is None:
            raise JobFailed(f"Megatron-Bridge wrote no whole checkpoint: {output / TRACKER} names none")
    else:
        require_hf_folder(output, "Megatron-Bridge")


def repair_imports() -> None:
    """From now on what AutoBridge makes of a model's config has YARN's fields filled in where it left them None."""
    from megatron.bridge import AutoBridge

    made = AutoBridge.to_megatron_provider

    def repaired(bridge: Any, *given: Any, **named: Any) -> Any:
        provider = made(bridge, *given, **named)
        repair_yarn(provider)
        return provider

    AutoBridge.to_megatron_provider = repaired


def require_gpu(model: Path, context: Context) -> None:
    """UserError: this model has layers that can't be built here, or this rank has no GPU of its own.

    On a CPU several ranks get wrong weights, without a word: RowParallelMapping of 0.3.1 scatters views of a tensor,
    which Gloo takes for whole ones; on their way to a GPU they become that.
    """
    import torch

    if context.world_size > 1 and context.local_rank >= torch.cuda.device_count():
        here = torch.cuda.device_count()
        what = f"a conversion that is shared out takes a GPU for each process: there are {here} here"
        raise UserError(Problem(what, "parallel", "parallel=null converts on the CPU, in one process"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if any(config.get(name) for name in _NEED_GPU) and not torch.cuda.is_available():
        what = (
            "Megatron-Core builds Mamba layers and experts only where a GPU is visible, even to convert their weights"
        )
        raise UserError(Problem(what, "model.path", "give the stage a GPU: in its profile, gpus_per_node or gpus"))


def import_model(model: Path, output: Path, config: Tree) -> None:
    """Hugging Face folder -> checkpoint root with its tracker file."""
    import torch
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        from megatron.bridge import AutoBridge

        kind, trust = getattr(torch, config["dtype"]), config["trust_remote_code"]
        AutoBridge.import_ckpt(str(model), str(output), torch_dtype=kind, device_map="cpu", trust_remote_code=trust)
        return
    bridge = _bridge(model, config)
    loaded = _provider(bridge, config, load_weights=True).provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=not torch.cuda.is_available()
    )
    of_tokenizer: Tree = getattr(bridge._model_bridge, "get_hf_tokenizer_kwargs", dict)() or {}
    of_tokenizer |= {"trust_remote_code": True} if config["trust_remote_code"] else {}
    bridge.save_megatron_model(
        loaded, str(output), hf_tokenizer_path=str(model), hf_tokenizer_kwargs=of_tokenizer or None
    )


def export_model(model: Path, checkpoint: Path, output: Path, config: Tree) -> None:
    """Checkpoint -> Hugging Face folder, with the tokenizer and the config of `model`."""
    bridge = _bridge(model, config)
    loaded = _load(bridge, checkpoint, config)
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
    loaded = lora(_load(bridge, base, config), training=False)
    wanted = apply_peft_adapter_filter_to_state_dict(_generate_model_state_dict(loaded, {}), lora)
    found = dist_checkpointing.load(wanted, str(adapters))
    section = found["model"] if "model" in found else next(found[key] for key in found if key.startswith("model"))
    names = {n for n in loaded[0].state_dict() if ".adapter." in n and not n.endswith("_extra_state")}
    if not from_all(names) or (missing := from_all(names - set(section))):
        raise JobFailed(f"{adapters} lacks adapters: {', '.join(sorted(missing)[:5]) if names else 'it has none'}")
    loaded[0].load_state_dict(section, strict=False)
    bridge.save_hf_pretrained(
        loaded, str(output), show_progress=False, strict=config["strict"], merge_adapter_weights=True
    )


def _load(bridge: Any, checkpoint: Path, config: Tree) -> Any:
    """A checkpoint's model; with several ranks each holds its part of it, on its GPU."""
    import torch
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return bridge.load_megatron_model(str(checkpoint), wrap_with_ddp=False)
    _provider(bridge, config, load_weights=False)
    layout = layout_of(config["parallel"], getattr(torch, config["dtype"]))
    loaded = bridge.load_megatron_model(str(checkpoint), mp_overrides=layout, wrap_with_ddp=False)
    return [part.cuda() for part in loaded] if torch.cuda.is_available() else loaded


def _provider(bridge: Any, config: Tree, load_weights: bool) -> Any:
    """What builds the model in the layout of the config; with it the groups of all ranks are there."""
    import torch

    provider = bridge.to_megatron_provider(load_weights=load_weights)
    for name, value in layout_of(config["parallel"], getattr(torch, config["dtype"])).items():
        setattr(provider, name, value)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    return provider


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
