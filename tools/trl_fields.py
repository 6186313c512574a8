"""Write nemotron_recipes/backends/trl_fields.json from the installed TRL and Transformers.

The planner knows every native key and its type from that file, without an import of torch. Run this after a change of
a pinned version; a contract test fails until then.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent.parent / "nemotron_recipes" / "backends" / "trl_fields.json"


def fields() -> dict[str, dict[str, str]]:
    """{"common": fields that all methods share, "sft", "dpo", ...: the others, "arch": NemotronHConfig's}."""
    import transformers
    from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

    methods = {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig, "grpo": GRPOConfig}
    of = {name: {f.name: _text(f.type) for f in dataclasses.fields(config)} for name, config in methods.items()}
    shared = set.intersection(*(set(found.items()) for found in of.values()))
    base = {f.name for f in dataclasses.fields(transformers.PreTrainedConfig)}
    # The vocabulary is the tiny tokenizer's; the rest are properties of one architecture.
    left_out = base | {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
    arch = {f.name: _text(f.type) for f in dataclasses.fields(transformers.NemotronHConfig) if f.name not in left_out}
    return {
        "common": dict(shared),
        **{name: dict(found.items() - shared) for name, found in of.items()},
        "arch": arch,
    }


def _text(annotation: Any) -> str:
    """`int`, `float | None`, ...; what isn't made of JSON's scalar types alone is "any"."""
    members = typing.get_args(annotation) or (annotation,)
    names = [member.__name__ for member in members if isinstance(member, type)]
    if len(names) == len(members) and set(names) <= {"int", "float", "bool", "str", "NoneType"}:
        return " | ".join(sorted(names)).replace("NoneType", "None")
    return "any"


if __name__ == "__main__":
    TARGET.write_text(json.dumps(fields(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
