"""NeMo-RL's config from its source, as JSON: python collect_nemo_rl.py SOURCE VERSION COMMIT BASE,BASE,... TORCH

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
from signatures import Package

ROOTS = ("nemo_rl/algorithms/dpo.py", "nemo_rl/algorithms/grpo.py")  # each with a MasterConfig
SCALARS = {"int", "float", "bool", "str", "None"}
# Keyword arguments of other packages, servers' configs of NeMo-Gym, or what the user chooses.
OPEN = (
    *("policy.generation.vllm_kwargs", "policy.hf_config_overrides", "policy.dtensor_cfg.automodel_kwargs"),
    *("policy.megatron_cfg.env_vars", "policy.dtensor_cfg.env_vars", "policy.tokenizer.chat_template_kwargs"),
    *("policy.generation.vllm_cfg.env_vars", "policy.generation.vllm_cfg.http_server_serving_chat_kwargs"),
    *("env.nemo_gym", "env.reward_model", "data.default", "data.train", "data.validation"),
)
# Environments (nemo_rl/environments/utils.py) that judge text, and the class of what each is given.
ENVIRONMENTS = {
    **dict.fromkeys(("math", "math_default", "math_multi_reward"), "MathEnvConfig"),
    "code": "CodeEnvConfig",
    "code_jaccard": "CodeJaccardEnvConfig",
    "reward_model": "RewardModelEnvironmentConfig",
    "nemo_gym": "NemoGymConfig",
}
# Open sections of which nearly every name is known, by these classes and by NeMo-RL's examples: what looks like a slip
# for one is refused there. Names of servers in env.nemo_gym are free.
NAMED = {
    "policy.dtensor_cfg.automodel_kwargs": ("AutomodelKwargs",),
    "data.default": ("ResponseDatasetConfig", "PreferenceDatasetConfig"),
    "env.nemo_gym": ("NemoGymConfig",),
    "env.reward_model": ("RewardModelEnvironmentConfig",),
}
OPTIMIZER = "policy.optimizer.kwargs"  # of torch.optim.AdamW
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


def seen(source: Path) -> dict[str, set[str]]:
    """Section of NAMED -> names of values that NeMo-RL's own examples have in it."""
    names: dict[str, set[str]] = {section: set() for section in NAMED}
    for file in sorted((source / "examples").rglob("*.yaml")):
        tree: Any = OmegaConf.to_container(OmegaConf.load(file))
        for section in names:
            node = tree
            for part in section.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            for key, value in node.items() if isinstance(node, dict) else ():
                if key != "_override_" and not (isinstance(value, dict) and section == "env.nemo_gym"):
                    names[section].add(str(key))
    return names


def main() -> None:
    source, version, commit = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    found: dict[str, set[str]] = {}
    classes = Classes(source)
    for root in ROOTS:
        tree = ast.parse((source / root).read_text(encoding="utf-8"))
        (master,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MasterConfig"]
        for key, kind in classes.walk(own_fields(master)):
            found.setdefault(key, set()).update(kind.split(" | "))
    for name, cls in ENVIRONMENTS.items():
        found.setdefault(f"env.{name}", {"any"})
        if f"env.{name}" not in OPEN:
            for key, kind in classes.walk(classes.fields[cls], f"env.{name}."):
                found.setdefault(key, set()).update(kind.split(" | "))
    found |= {"env.should_use_nemo_gym": {"bool"}, "env.should_log_nemo_gym_responses": {"bool"}}
    torch = Package(Path(sys.argv[5]))
    adamw = torch.find("torch.optim.adamw.AdamW")
    assert adamw is not None
    for key, field in torch.taken(adamw[0], adamw[1])["fields"].items():
        found[f"{OPTIMIZER}.{key}"] = {*field["type"].split(" | "), *(("int",) if "float" in field["type"] else ())}
    typed, bases = {key for key, kinds in found.items() if "any" not in kinds}, {}
    for base in sys.argv[4].split(","):
        values = dict(leaves(OmegaConf.to_container(merged(source / base))))  # type: ignore[arg-type]
        bases[base] = {"values": values}
        for key, value in values.items():
            exact = key in typed and type(value) is int  # a class says whether it may be a fraction
            found.setdefault(key, set()).update(["int"] if exact else kind_of(value).split(" | "))
    sections: dict[str, dict[str, Any]] = {}
    for key, kinds in sorted(found.items()):
        section, _, name = key.partition(".")
        wide = {*kinds, "int"} if "float" in kinds else kinds
        if name:
            sections.setdefault(section, {})[name] = {
                "type": "any" if "any" in wide or "section" in wide else " | ".join(sorted(wide))
            }
    names = seen(source)
    for key in OPEN:
        section, _, name = key.partition(".")
        entry: dict[str, Any] = {"type": "any"}
        if key in NAMED:
            entry["examples"] = sorted(names[key].union(*(classes.fields[cls] for cls in NAMED[key])))
        sections.setdefault(section, {})[f"{name}.*"] = entry
    schema = {
        "package": "nemo-rl",
        "version": version,
        "with": {"commit": commit, **dict(argument.split("=") for argument in sys.argv[6:])},
        "stubs": [],
        "top": {},
        "sections": {name: [name] for name in sections},
        "classes": {name: {"module": "nemo_rl", "fields": fields} for name, fields in sections.items()},
        "recipes": bases,
    }
    print(json.dumps(schema))


if __name__ == "__main__":
    main()
