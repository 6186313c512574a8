"""What callables of a package take, read from its source: nothing is imported, so any version can be read anywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

SCALARS = {"int", "float", "bool", "str", "None"}
LISTS = {"list", "List", "Sequence", "Iterable", "tuple", "Tuple"}
# Base classes of other packages that take no keywords of their own.
PLAIN = {"object", "ABC", "Protocol", "nn.Module", "torch.nn.Module", "Module", "Dataset", "IterableDataset"}
Definition = ast.ClassDef | ast.FunctionDef


class Module:
    """One file: what it defines, and what it has from elsewhere under the same or another name."""

    def __init__(self, file: Path, name: str):
        self.name, self.package = name, file.name == "__init__.py"
        self.tree = ast.parse(file.read_text(encoding="utf-8"))
        self.own = {node.name: node for node in self.tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}

    @cached_property
    def others(self) -> dict[str, str]:
        """Name -> where it comes from, dotted: imports, and tables {"Name": ("module", "Name")} of lazy ones."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                above = self.name.split(".")[: len(self.name.split(".")) - node.level + self.package]
                module = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
                found |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                        texts = [str(part.value) for part in value.elts if isinstance(part, ast.Constant)]
                        if len(texts) == 2:
                            found[str(key.value)] = ".".join(texts)
        return found


class Package:
    """The modules of one package, by their dotted names."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self._modules: dict[str, Module | None] = {}

    def modules(self, below: str = "") -> Iterator[Module]:
        """Those below a folder of it, in a stable order."""
        for file in sorted((self.folder / below).rglob("*.py") if (self.folder / below).is_dir() else []):
            parts = [self.name, *file.relative_to(self.folder).with_suffix("").parts]
            found = self.module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
            if found:
                yield found

    def module(self, dotted: str) -> Module | None:
        """None: there is no such file."""
        if dotted not in self._modules:
            path = self.folder.joinpath(*dotted.split(".")[1:])
            files = [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
            named = dotted.split(".")[0] == self.name
            self._modules[dotted] = Module(files[0], dotted) if named and files else None
        return self._modules[dotted]

    def find(self, dotted: str, depth: int = 0) -> tuple[Module, Definition, str] | None:
        """(where it is defined, the class or function, the method after it or ""); None: it is not of this package."""
        path, _, last = dotted.rpartition(".")
        module = self.module(path)
        if module and last in module.own:
            return module, module.own[last], ""
        if module and last in module.others and depth < 8:
            return self.find(module.others[last], depth + 1)
        owner = self.find(path, depth + 1) if not module and "." in path and depth < 8 else None
        return (owner[0], owner[1], last) if owner and not owner[2] else None

    def taken(self, module: Module, node: Definition, method: str = "") -> dict[str, Any]:
        """{"fields": {name: entry}, "open": True where it takes any keyword} of a function, a class, or its method."""
        if isinstance(node, ast.FunctionDef):
            return parameters(node)
        methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        bases = [(ast.unparse(base), self._base(module, base)) for base in node.bases]
        if not method and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            fields: dict[str, Any] = {}
            for _, base in reversed(bases):
                fields |= self.taken(*base)["fields"] if base else {}
            return {"fields": fields | fields_of(node)}
        if (wanted := method or "__init__") in methods:
            return parameters(methods[wanted])
        for _, base in bases:
            if base:
                return self.taken(*base, method)
        known = not method and all(text in PLAIN or text.partition("[")[0] in PLAIN for text, _ in bases)
        return {"fields": {}} if known else {"fields": {}, "open": True}

    def _base(self, module: Module, base: ast.expr) -> tuple[Module, ast.ClassDef] | None:
        name = ast.unparse(base).partition("[")[0]
        if name in module.own:
            found: tuple[Module, Definition, str] | None = (module, module.own[name], "")
        else:
            found = self.find(module.others[name]) if name in module.others else None
        return (found[0], found[1]) if found and isinstance(found[1], ast.ClassDef) and not found[2] else None


def parameters(node: ast.FunctionDef) -> dict[str, Any]:
    """Of a function or method, without what it is called on."""
    told, found = node.args, {}
    plain = [*told.posonlyargs, *told.args]
    defaults = [None] * (len(plain) - len(told.defaults)) + list(told.defaults)
    for item, default in [*zip(plain, defaults, strict=True), *zip(told.kwonlyargs, told.kw_defaults, strict=True)]:
        if item.arg not in ("self", "cls"):
            found[item.arg] = entry_of(item.annotation, default)
    return {"fields": found, **({"open": True} if told.kwarg else {})}


def fields_of(node: ast.ClassDef) -> dict[str, Any]:
    """The annotated fields of a dataclass with their defaults, as its source writes them."""
    found: dict[str, Any] = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            text = ast.unparse(item.value) if item.value else ""
            if "ClassVar" not in ast.unparse(item.annotation) and "init=False" not in text:
                found[item.target.id] = entry_of(item.annotation, item.value)
    return found


def entry_of(annotation: ast.expr | None, default: ast.expr | None) -> dict[str, Any]:
    """{"type", "choices" of a Literal, "default"}; `int = None` takes None too."""
    entry = type_of(annotation) if annotation else {"type": "any"}
    if default is None:
        return {**entry, "required": True}
    try:
        entry["default"] = ast.literal_eval(default)
    except ValueError:
        entry["default_is"] = ast.unparse(default)
    if entry.get("default", ...) is None and entry["type"] != "any":
        entry["type"] = " | ".join(sorted({*entry["type"].split(" | "), "None"}))
    return entry


def type_of(annotation: ast.expr) -> dict[str, Any]:
    """`Optional[Literal["up"]]` -> {"type": "None | str", "choices": ["up"]}; "any" where YAML has no word for it."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    names, choices = set(), []
    for part in members(annotation):
        head = ast.unparse(part.value if isinstance(part, ast.Subscript) else part).rpartition(".")[2]
        if head == "Literal" and isinstance(part, ast.Subscript):
            given = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
            choices += [item.value for item in given if isinstance(item, ast.Constant)]
            names |= {type(choice).__name__ for choice in choices}
        else:
            names.add("list" if head in LISTS else {"Path": "str", "PathLike": "str"}.get(head, head))
    if not names <= {*SCALARS, "list"}:
        return {"type": "any"}
    return {"type": " | ".join(sorted(names)), **({"choices": choices} if choices else {})}


def members(annotation: ast.expr) -> Iterator[ast.expr]:
    """Of a union, however it is written."""
    if isinstance(annotation, ast.BinOp):
        yield from members(annotation.left)
        yield from members(annotation.right)
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).rpartition(".")[2] in (
        *("Optional", "Union"),
    ):
        inner = annotation.slice
        for part in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
            yield from members(part)
        if ast.unparse(annotation.value).endswith("Optional"):
            yield ast.Constant(None)
    else:
        yield annotation
