"""Stand-ins for packages that need CUDA to be installed or imported; each is named where it is used."""

from __future__ import annotations

import abc
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any


class _Anything(abc.ABCMeta):
    """A class of which every attribute is another one: enough for base classes, annotations and module constants."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> _Anything:
        callable_object = {
            "__init__": lambda self, *given, **named: None,
            "__call__": lambda self, *given, **named: given[0] if given else self,  # a decorator leaves things alone
        }
        return super().__new__(cls, name, bases, {**callable_object, **namespace})

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __getitem__(cls, key: Any) -> Any:
        return cls


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self.names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__dict__.update(__path__=[], __version__="2.10.0")

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Anything(name, (), {"__module__": spec.name})

        module.__dict__["__getattr__"] = attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


def install(names: Iterable[str]) -> None:
    """From now on an import of these packages, or of anything below them, gives a stand-in."""
    sys.meta_path.insert(0, _Finder(tuple(names)))
