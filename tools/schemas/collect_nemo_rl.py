"""NeMo-RL's config from its source: python collect_nemo_rl.py SOURCE VERSION COMMIT BASE,BASE,..., JSON on stdout.

NeMo-RL reads a YAML that begins from another one (`defaults`), and gives its sections to TypedDicts and pydantic
models. A key is known when one of the given base files has it, or one of those classes. Nothing of NeMo-RL is
imported, so any version can be read on any machine.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

ROOTS = ("nemo_rl/algorithms/dpo.py", "nemo_rl/algorithms/grpo.py")  # each with a MasterConfig
SCALARS = {"int", "float", "bool", "str", "None"}
# Keyword arguments of other packages, or of what the user chooses.
OPEN = (
    *("policy.generation.vllm_kwargs", "policy.hf_config_overrides", "policy.dtensor_cfg.automodel_kwargs"),
    *("policy.megatron_cfg.env_vars", "policy.dtensor_cfg.env_vars", "policy.tokenizer.chat_template_kwargs"),
    *("env", "data.default", "data.train", "data.validation", "policy.optimizer.kwargs"),
)
DEPTH = 5


def merged(file: Path) -> DictConfig:
    """A YAML with those that it begins from below it."""
    config: Any = OmegaConf.load(file)
    parents = config.pop("defaults", [])
    below: Any = OmegaConf.create({})
    for parent in [parents] if isinstance(parents, str) else parents:
        below = OmegaConf.merge(below, merged(file.parent / str(parent)))
    return OmegaConf.merge(below, config)  # type: ignore[return-value]


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in OPEN:
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def kind_of(value: Any) -> str:
    if isinstance(value, str) and value.startswith("${"):
        return "any"
    name = {"NoneType": "None", "dict": "section"}.get(type(value).__name__, type(value).__name__)
    return "float | int" if name in ("int", "float") else name


class Classes:
    """Every class with annotated fields in the package, by name."""

    def __init__(self, source: Path):
        self.fields: dict[str, dict[str, ast.expr]] = {}
        for file in sorted((source / "nemo_rl").rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    self.fields.setdefault(node.name, {}).update(own_fields(node))

    def walk(self, fields: dict[str, ast.expr], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
        """(dotted key, type) of every field below, where sections are classes of the package."""
        for name, annotation in fields.items():
            key = prefix + name
            members = list(parts(annotation))
            below = [self.fields[m] for m in members if self.fields.get(m)]
            yield key, " | ".join(sorted(set(members))) if set(members) <= {*SCALARS, "list"} else "any"
            if key not in OPEN and depth < DEPTH:
                for section in below:
                    yield from self.walk(section, f"{key}.", depth + 1)


def own_fields(node: ast.ClassDef) -> dict[str, ast.expr]:
    found = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    return {item.target.id: item.annotation for item in found}  # type: ignore[union-attr]


def parts(annotation: ast.expr) -> Iterator[str]:
    """Names in an annotation: `NotRequired[A | None]` -> A, None."""
    if isinstance(annotation, ast.BinOp):
        yield from parts(annotation.left)
        yield from parts(annotation.right)
    elif isinstance(annotation, ast.Subscript):
        head = ast.unparse(annotation.value).rpartition(".")[2]
        if head in ("NotRequired", "Annotated", "Optional", "Union"):
            inner = annotation.slice
            members = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            for member in members[:1] if head == "Annotated" else members:
                yield from parts(member)
            if head == "Optional":
                yield "None"
        else:
            yield "list" if head in ("list", "List") else "any"
    elif isinstance(annotation, ast.Constant):
        yield "None" if annotation.value is None else str(annotation.value)
    else:
        yield ast.unparse(annotation).rpartition(".")[2]


def main() -> None:
    source, version, commit = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    found: dict[str, set[str]] = {}
    classes = Classes(source)
    for root in ROOTS:
        tree = ast.parse((source / root).read_text(encoding="utf-8"))
        (master,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MasterConfig"]
        for key, kind in classes.walk(own_fields(master)):
            found.setdefault(key, set()).update(kind.split(" | "))
    bases = {}
    for base in sys.argv[4].split(","):
        values = dict(leaves(OmegaConf.to_container(merged(source / base))))  # type: ignore[arg-type]
        bases[base] = {"values": values}
        for key, value in values.items():
            found.setdefault(key, set()).update(kind_of(value).split(" | "))
    sections: dict[str, dict[str, Any]] = {}
    for key, kinds in sorted(found.items()):
        section, _, name = key.partition(".")
        wide = {*kinds, "int"} if "float" in kinds else kinds
        if name:
            sections.setdefault(section, {})[name] = {
                "type": "any" if "any" in wide or "section" in wide else " | ".join(sorted(wide))
            }
    for key in OPEN:
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[f"{name}.*" if name else "*"] = {"type": "any"}
    schema = {
        "package": "nemo-rl",
        "version": version,
        "with": {"commit": commit},
        "stubs": [],
        "top": {},
        "sections": {name: [name] for name in sections},
        "classes": {name: {"module": "nemo_rl", "fields": fields} for name, fields in sections.items()},
        "recipes": bases,
    }
    print(json.dumps(schema))


if __name__ == "__main__":
    main()
