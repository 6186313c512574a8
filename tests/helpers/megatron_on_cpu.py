"""Runs where megatron-bridge is installed, on a CPU with a fake Transformer Engine.

megatron_on_cpu.py worker --config FILE       a stage's worker, as in its image
megatron_on_cpu.py model FOLDER               a tiny Llama with a tokenizer
megatron_on_cpu.py adapters BASE FOLDER       random LoRA on linear_proj, as a checkpoint beside the base
megatron_on_cpu.py compare A B [ADAPTERS]     JSON: largest difference of each weight, adapters added to A before
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import fake_transformer_engine  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

fake_transformer_engine.install()
LORA = {"target_modules": ["linear_proj"], "dim": 4, "alpha": 8, "dropout": 0.0}


def make_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemotron_recipes.tiny.tokenizer import write_tokenizer

    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)


def make_adapters(base: Path, hf: Path, folder: Path) -> None:
    """A checkpoint with adapters, and the section peft in its run_config.yaml as training writes it."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.model_load_save import save_megatron_model, temporary_distributed_context

    with temporary_distributed_context(backend="gloo"):
        bridge = AutoBridge.from_hf_pretrained(str(hf), torch_dtype=torch.bfloat16)
        model = LoRA(**LORA)(bridge.load_megatron_model(str(base), wrap_with_ddp=False), training=False)
        torch.manual_seed(5)
        found = {n: p for n, p in model[0].named_parameters() if ".adapter." in n}
        for parameter in found.values():
            torch.nn.init.normal_(parameter.data, std=0.1)
        save_megatron_model(model, folder, hf_tokenizer_path=hf)
        torch.save({name: p.detach().clone() for name, p in found.items()}, folder / "adapters.pt")
    file = folder / "iter_0000000" / "run_config.yaml"
    text = file.read_text()
    peft = {"_target_": "megatron.bridge.peft.lora.LoRA", **LORA}
    assert "\npeft: null\n" in text
    file.write_text(text.replace("\npeft: null\n", "\n" + yaml.safe_dump({"peft": peft})))


def compare(a: Path, b: Path, adapters: Path | None) -> dict[str, float]:
    from safetensors.torch import load_file

    one, other = ({n: w.bfloat16() for p in f.glob("*.safetensors") for n, w in load_file(p).items()} for f in (a, b))
    assert one.keys() == other.keys()
    if adapters:
        found = torch.load(adapters)
        for layer in range(2):
            (low,) = [v for n, v in found.items() if f"layers.{layer}." in n and "linear_in" in n]
            (up,) = [v for n, v in found.items() if f"layers.{layer}." in n and "linear_out" in n]
            one[f"model.layers.{layer}.self_attn.o_proj.weight"] += LORA["alpha"] / LORA["dim"] * (up @ low)
    return {name: float((one[name].float() - other[name].float()).abs().max()) for name in one}


def main() -> int:
    command, *rest = sys.argv[1:]
    if command == "worker":
        from nemotron_recipes.worker.megatron_convert import stage
        from nemotron_recipes.worker.runtime import main as worker

        stage.require_gpu = lambda model, context: None  # the fakes are built without one
        return worker(rest)
    paths = [Path(argument) for argument in rest]
    if command == "model":
        make_model(*paths)
    elif command == "adapters":
        make_adapters(*paths)
    else:
        print(json.dumps(compare(paths[0], paths[1], paths[2] if len(paths) > 2 else None)))
    return 0


if __name__ == "__main__":  # saving starts processes that import this file again
    sys.exit(main())
