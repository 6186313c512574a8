"""NeMo AutoModel's YAML sections from its source: python collect_automodel.py SOURCE VERSION COMMIT, JSON on stdout.

AutoModel reads a YAML whose sections become keyword arguments of dataclasses; a few keys are taken out before by its
recipe layer and stand in `EXTRA`. Nothing is imported, so any version can be read on any machine; what is not a
dataclass (`model`, `dataset`, ...: keyword arguments of the `_target_` that the section names) stays open.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

SCALARS = {"int", "float", "bool", "str", "None"}
CLASSES = {  # section -> (file, class) whose fields it takes
    "step_scheduler": ("components/training/step_scheduler.py", "StepSchedulerConfig"),
    "checkpoint": ("components/checkpoint/config.py", "CheckpointingConfig"),
    "lr_scheduler": ("components/optim/optimizer.py", "LRSchedulerConfig"),
    "peft": ("components/_peft/lora.py", "PeftConfig"),
    "distributed": ("components/distributed/config.py", "FSDP2Config"),
}
EXTRA = {  # keys that recipes/_typed_config.py, _dist_utils.py and llm/train_ft.py take themselves
    "step_scheduler": {"local_batch_size": "int"},
    "checkpoint": {"restore_from": "None | str"},
    "peft": {"_target_": "str"},
    "distributed": {
        "strategy": "str",
        **dict.fromkeys(("tp_size", "pp_size", "cp_size", "ep_size"), "int"),
        **dict.fromkeys(("dp_size", "dp_replicate_size"), "any"),
        **dict.fromkeys(("pipeline", "moe"), "any"),
    },
    "dist_env": {"backend": "str", "timeout_minutes": "int"},
    "clip_grad_norm": {"max_norm": "float"},
    "packed_sequence": {
        "packed_sequence_size": "int",
        "packing_strategy": "str",
        "split_across_pack": "bool",
        "max_packs": "None | int",
        "drop_long_samples": "bool",
    },
    "compile": {"enabled": "bool", "mode": "str", "fullgraph": "bool", "dynamic": "bool", "backend": "None | str"},
}
OPEN = (
    *("model", "dataset", "validation_dataset", "dataloader", "validation_dataloader", "optimizer", "loss_fn"),
    *("rng", "fp8", "quantization", "qat", "neftune", "moe_metrics", "tokenizer"),
)
TOP = {"recipe": "str", "seed": "int", "nvtx": "bool", "sdpa_method": "any"}


def fields_of(file: Path, name: str) -> dict[str, Any]:
    """The annotated fields of a dataclass with their defaults, as its source writes them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    fields: dict[str, Any] = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            entry: dict[str, Any] = {"type": type_of(node.annotation)}
            if node.value is None:
                entry["required"] = True
            else:
                try:
                    entry["default"] = ast.literal_eval(node.value)
                except ValueError:
                    entry["default_is"] = ast.unparse(node.value)
            fields[node.target.id] = entry
    return fields


def type_of(annotation: ast.expr) -> str:
    text = ast.unparse(annotation)
    if text.startswith("Optional["):
        text = f"{text[9:-1]} | None"
    names = {"list" if part.startswith(("list", "List")) else part for part in text.split(" | ")}
    names = {"str" if part == "Path" else part for part in names}
    return " | ".join(sorted(names)) if names <= {*SCALARS, "list"} else "any"


def main() -> None:
    source, version, commit = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    classes: dict[str, Any] = {}
    for section in sorted({*CLASSES, *EXTRA}):
        fields: dict[str, Any] = {}
        if section in CLASSES:
            file, name = CLASSES[section]
            fields |= fields_of(source / "nemo_automodel" / file, name)
        fields |= {key: {"type": kind} for key, kind in EXTRA.get(section, {}).items()}
        classes[section] = {"module": CLASSES.get(section, ("recipes",))[0], "fields": fields}
    for section in OPEN:
        classes[section] = {"module": "keyword arguments of its _target_", "open": True, "fields": {}}
    schema = {
        "package": "nemo-automodel",
        "version": version,
        "with": {"commit": commit},
        "stubs": [],
        "top": {key: {"type": kind} for key, kind in TOP.items()},
        "sections": {name: [name] for name in classes},
        "classes": classes,
        "recipes": {},
    }
    print(json.dumps(schema))


if __name__ == "__main__":
    main()
