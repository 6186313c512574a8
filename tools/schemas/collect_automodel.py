"""NeMo AutoModel's YAML sections from its source: python collect_automodel.py SOURCE VERSION COMMIT PACKAGE,PACKAGE,...

AutoModel reads a YAML whose sections become keyword arguments: of dataclasses, or of the `_target_` that a section
names; a few keys are taken out before by its recipe layer and stand in `EXTRA`. JSON on stdout. Nothing is imported, so
any version can be read on any machine. The PACKAGEs are folders of others whose callables are named (torch, torchdata).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from signatures import Package

NAME = "nemo_automodel"
CLASSES = {  # section -> class whose fields it takes
    "step_scheduler": "components.training.step_scheduler.StepSchedulerConfig",
    "checkpoint": "components.checkpoint.config.CheckpointingConfig",
    "lr_scheduler": "components.optim.optimizer.LRSchedulerConfig",
    "peft": "components._peft.lora.PeftConfig",
    "distributed": "components.distributed.config.FSDP2Config",
    "distributed.pipeline": "components.distributed.pipelining.config.PipelineConfig",
    "distributed.moe": "components.distributed.config.MoEParallelizerConfig",
    "fp8": "components.quantization.fp8.FP8Config",
    "compile": "components.utils.compile_utils.CompileConfig",
    "moe_metrics": "components.moe.config.MoEMetricsConfig",
}
EXTRA = {  # keys that recipes/_typed_config.py, _dist_utils.py and llm/train_ft.py take themselves
    "step_scheduler": {"local_batch_size": "int"},
    "checkpoint": {"restore_from": "None | str"},
    "peft": {"_target_": "str"},
    "distributed": {
        "strategy": "str",
        **dict.fromkeys(("tp_size", "pp_size", "cp_size", "ep_size"), "int"),
        **dict.fromkeys(("dp_size", "dp_replicate_size"), "None | int"),
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
    "qat": {"enabled": "bool", "fake_quant_after_n_steps": "int", "qat_config": "any", "quantizer": "any"},
    "quantization": {
        **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant"), "bool"),
        **dict.fromkeys(("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_quant_storage"), "str"),
    },
    "neftune": {"noise_alpha": "float"},
}
TOP = {"recipe": "str", "seed": "int", "nvtx": "bool", "sdpa_method": "any"}
# Sections that are keyword arguments of the `_target_` that they name.
TARGETS = (
    *("model", "dataset", "validation_dataset", "dataloader", "validation_dataloader", "optimizer", "loss_fn"),
    "tool_call_eval",
)
# Of the data loader's section, what train_ft.py takes out before it calls the loader.
LOADER = ("torchdata.stateful_dataloader.StatefulDataLoader", "torch.utils.data.DataLoader")
TAKEN_OUT = {"dataloader_type": "str", "group_by_length": "bool", "shuffle_buffer_size": "int"}
# Folders whose callables a `_target_` may be; what an example names elsewhere is read too.
READ = (
    *("_transformers", "components/datasets", "components/loss", "components/_peft", "components/models/common"),
    *("components/distributed", "components/quantization", "components/training", "components/eval"),
)
OTHERS = {  # of other packages: what it is called, where it stands
    "torch.optim.AdamW": "torch.optim.adamw.AdamW",
    "torch.utils.data.DataLoader": "torch.utils.data.dataloader.DataLoader",
    "torch.distributed.fsdp.MixedPrecisionPolicy": "torch.distributed.fsdp._fully_shard._fsdp_api.MixedPrecisionPolicy",
    "torch.distributed.fsdp.CPUOffloadPolicy": "torch.distributed.fsdp._fully_shard._fsdp_api.CPUOffloadPolicy",
    "torchdata.stateful_dataloader.StatefulDataLoader": (
        "torchdata.stateful_dataloader.stateful_dataloader.StatefulDataLoader"
    ),
}


def examples(source: Path) -> Iterator[tuple[str, set[str]]]:
    """(`_target_`, keys beside it) of every section of the published recipes for language models."""
    for file in sorted((source / "examples").glob("llm_*/**/*.yaml")):
        yield from _named(yaml.safe_load(file.read_text(encoding="utf-8")))


def _named(tree: Any) -> Iterator[tuple[str, set[str]]]:
    if isinstance(tree, dict):
        if isinstance(target := tree.get("_target_"), str):
            yield target, {key for key in tree if key != "_target_"}
        for value in tree.values():
            yield from _named(value)


def callables(source: Path, packages: list[Package]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each callable takes, and the other names under which it can be named."""
    own, classes, names = Package(source / NAME), {}, {}
    seen: dict[str, set[str]] = {}
    for target, keys in examples(source):
        seen.setdefault(target, set()).update(keys)
    wanted = {f"{NAME}.{name}": f"{NAME}.{name}" for name in own.module(NAME).others}  # type: ignore[union-attr]
    for folder in READ:
        for module in own.modules(folder):
            wanted |= {f"{module.name}.{name}": f"{module.name}.{name}" for name in module.own if name[0] != "_"}
            if module.package:
                wanted |= {f"{module.name}.{name}": where for name, where in module.others.items() if name[0] != "_"}
    for name in tuple(wanted):
        wanted |= {f"{name}.{way}": f"{wanted[name]}.{way}" for way in ("from_pretrained", "from_config")}
    wanted |= {target: target for target in seen} | OTHERS
    for called, where in sorted(wanted.items()):
        package = next((package for package in [own, *packages] if where.startswith(f"{package.name}.")), None)
        found = package.find(where) if package else None
        if package is None or found is None:
            continue
        module, node, method = found
        if method and not any(getattr(item, "name", "") == method for item in node.body) and called not in seen:
            continue  # a method that it hasn't
        real = f"{module.name}.{node.name}{'.' if method else ''}{method}"
        classes[real] = {"module": module.name, **package.taken(module, node, method)}
        if called != real:
            names[called] = real
    for target, keys in seen.items():
        entry = classes.get(names.get(target, target))
        if entry and entry.get("open"):
            entry["examples"] = sorted(keys - entry["fields"].keys())
    for name in LOADER:
        entry = classes[names.get(name, name)]
        entry["fields"] |= {key: {"type": kind} for key, kind in TAKEN_OUT.items()}
    return classes, names


def main() -> None:
    source, version, commit = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    packages = [Package(Path(folder)) for folder in sys.argv[4].split(",")]
    own = Package(source / NAME)
    classes, names = callables(source, packages)
    sections: dict[str, list[str]] = {}
    for section in sorted({*CLASSES, *EXTRA, *TARGETS}):
        entry: dict[str, Any] = {"module": f"{NAME}.recipes", "fields": {}}
        if section in CLASSES:
            found = own.find(f"{NAME}.{CLASSES[section]}")
            assert found is not None, section
            entry = {"module": f"{NAME}.{CLASSES[section]}", **own.taken(found[0], found[1])}
        elif section in TARGETS:
            entry |= {"module": "keyword arguments of its _target_", "open": True}
        entry["fields"] |= {key: {"type": kind} for key, kind in EXTRA.get(section, {}).items()}
        above, _, name = section.partition(".")
        classes[section] = entry
        if name:
            classes[above]["fields"][name] = {"type": "None | section", "class": [section]}
        else:
            sections[section] = [section]
    schema = {
        "package": "nemo-automodel",
        "version": version,
        "with": {"commit": commit, **dict(argument.split("=") for argument in sys.argv[5:])},
        "stubs": [],
        "top": {key: {"type": kind} for key, kind in TOP.items()},
        "sections": sections,
        "classes": classes,
        "names": names,
        "packages": sorted({m.name if m.package else m.name.rpartition(".")[0] for m in own.modules()}),
        "read": [f"{NAME}.{folder.replace('/', '.')}" for folder in READ],
        "recipes": {},
    }
    print(json.dumps(schema))


if __name__ == "__main__":
    main()
