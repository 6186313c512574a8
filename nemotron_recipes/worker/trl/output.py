"""Hugging Face folder out: weights with the adapters merged, the tokenizer, the chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import JobFailed
from nemotron_recipes.fsio import files_below, fsync_tree, write_atomic
from nemotron_recipes.worker.trl.config import TrlSettings
from nemotron_recipes.worker.trl.engine import Engine
from nemotron_recipes.worker.trl.models import DTYPES, Base

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
ADAPTER = "adapter"  # subfolder of the output for LoRA weights before the merge


def write_output(
    model: Any, base: Base, chat_template: str, settings: TrlSettings, folder: Path, engine: Engine
) -> None:
    """The trained model as `AutoModelForCausalLM.from_pretrained` loads it; adapters are merged, and kept beside it.

    A base in 4 bits is merged as it was before: into the 4 bits the adapters' change would be rounded away.
    The tokenizer's files are copied byte for byte: data that was prepared with it still fits this model.
    """
    if settings.peft is not None:
        model.save_pretrained(folder / ADAPTER)
    if settings.model.load_in_4bit:
        engine.write_merged(model, base.model, folder / ADAPTER, settings, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in config:
            raise JobFailed(f"the merged model in {folder} is still quantised; the adapters lie in {folder / ADAPTER}")
    else:
        if settings.peft is not None:
            model = model.merge_and_unload()
        model.to(DTYPES[settings.model.dtype])
        model.config.use_cache = True
        model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (base.tokenizer / name).is_file():
            shutil.copyfile(base.tokenizer / name, folder / name)
    write_atomic(folder / "chat_template.jinja", chat_template)
    mode = (folder / "chat_template.jinja").stat().st_mode
    for path in files_below(folder):
        path.chmod(mode)  # safetensors makes files that only their owner may read
    fsync_tree(folder)
