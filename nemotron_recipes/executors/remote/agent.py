"""What runs at the other end of an SSH connection: it calls functions of this project as they lie on the machine here.

The caller sends this text and the sources of the modules that it will call, all on the first line; nothing is installed
there. Then every line is a call, and every answer a line; several may be under way at once. When the connection is gone
no new call begins, but those that have begun come to their end: nothing is left half done. Standard library only.
"""

from __future__ import annotations

import base64
import importlib
import importlib.abc
import importlib.util
import json
import os
import sys
import threading
from typing import Any

MARK = "nemotron-recipes agent"
PACKAGE = "nemotron_recipes"
OLDEST = (3, 10)


def plain(value: Any) -> Any:
    """Data that JSON can carry: bytes, and paths as text, among it."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {"dict": [[plain(key), plain(inner)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def unplain(value: Any) -> Any:
    """The inverse of `plain`; paths and tuples stay text and lists."""
    if isinstance(value, dict):
        if "bytes" in value:
            return base64.b64decode(value["bytes"])
        return {unplain(key): unplain(inner) for key, inner in value["dict"]}
    if isinstance(value, list):
        return [unplain(inner) for inner in value]
    return value


class _Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports from texts in memory."""

    def __init__(self, texts: dict[str, str]):
        self.texts = texts

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in self.texts:
            is_package = any(other.startswith(f"{name}.") for other in self.texts)
            return importlib.util.spec_from_loader(name, self, is_package=is_package)
        if name.partition(".")[0] == PACKAGE:  # another version that may be installed there must not be mixed in
            raise ModuleNotFoundError(f"{name} was not sent along", name=name)
        return None

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        name = module.__name__
        exec(compile(self.texts[name], f"<{name}>", "exec"), module.__dict__)


class _Server:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def answer(self, **said: Any) -> None:
        text = json.dumps(said, ensure_ascii=True) + "\n"
        with self.lock:
            try:
                sys.stdout.write(text)
                sys.stdout.flush()
            except OSError:  # nobody is there any more; what was called has been done
                pass

    def carry_out(self, call: dict[str, Any]) -> None:
        number = call["id"]
        try:
            function = getattr(importlib.import_module(call["module"]), call["function"])
            self.answer(id=number, value=plain(function(*unplain(call["args"]))))
        except OSError as error:
            self.answer(id=number, oserror=[error.errno, error.strerror or str(error), str(error.filename or "")])
        except Exception as error:  # noqa: BLE001  it is the caller's, and is raised again there
            problems = [[p.what, p.where, p.fix] for p in getattr(error, "problems", ())]
            self.answer(id=number, error=f"{type(error).__name__}: {error}", problems=problems)


def serve(texts: dict[str, str]) -> None:
    """Answer calls until the connection ends."""
    sys.meta_path.insert(0, _Sources(texts))
    server = _Server()
    sys.stdout.write(f"\n{MARK}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        if not line.endswith("\n"):
            break  # the connection broke within a call: nobody has asked for anything
        call = json.loads(line)
        if call:
            threading.Thread(target=server.carry_out, args=(call,)).start()
        else:  # somebody waits, and asks for a sign of life
            server.answer()
