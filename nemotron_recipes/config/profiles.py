"""env.toml: where runs go. Found upwards from the current folder, or named by $NEMOTRON_ENV.

[wandb]           project, entity, data_name, model_name, upload ("references" or "files")
[artifacts]       output (folder of runs), store (folder of artifacts); relative to the file
[PROFILE]         executor = "...", extends = "OTHER", and the executor's own fields
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_recipes.config.tree import merge
from nemotron_recipes.env_file import find_env_file
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.spec import Tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SETTINGS = {
    "wandb": ("entity", "project", "data_name", "model_name", "upload"),
    "artifacts": ("output", "store"),
}
UPLOADS = ("references", "files")
DEFAULT_OUTPUT = "nemotron-output"


@dataclass(frozen=True)
class Environment:
    """A read env.toml; an empty one, based on the current folder, when there is none."""

    base: Path
    path: Path | None = None
    wandb: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    profiles: Mapping[str, Tree] = field(default_factory=dict)  # `extends` already merged in

    @property
    def output(self) -> Path:
        """Folder that holds `runs/`."""
        return (self.base / os.path.expanduser(self.artifacts.get("output", DEFAULT_OUTPUT))).absolute()

    @property
    def store(self) -> Path:
        """Folder of the artifact store."""
        named = self.artifacts.get("store")
        return (self.base / os.path.expanduser(named)).absolute() if named else self.output / "store"

    def profile(self, name: str) -> Tree:
        """A profile's fields. UserError with the nearest name when there is none."""
        if name not in self.profiles:
            where = str(self.path) if self.path else "no env.toml was found upwards from the current folder"
            fix = nearest(name, self.profiles) or "add the profile to env.toml (an example stands in the project's own)"
            raise UserError(Problem(f"unknown profile '{name}'", where, fix))
        return self.profiles[name]


def read_environment(cwd: Path | None = None, environ: Mapping[str, str] = os.environ) -> Environment:
    """Find, parse and check env.toml. UserError carries every problem of the file at once."""
    cwd = (cwd or Path.cwd()).absolute()
    path = find_env_file(cwd, environ)
    if path is None:
        return Environment(base=cwd)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(Problem(f"env.toml can't be read: {error}", str(path), "mend the line that is named")) from None
    except OSError as error:
        raise UserError(Problem(f"env.toml can't be read: {error.strerror}", str(path))) from None

    problems: list[Problem] = []
    settings = {name: _settings(name, tables.pop(name, {}), path, problems) for name in SETTINGS}
    problems += _mirror_problems(settings["wandb"], path)
    profiles: dict[str, Tree] = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            problems.append(Problem(f"'{name}' stands outside any table", str(path), "put it below [PROFILE]"))
    raw = {name: table for name, table in tables.items() if isinstance(table, dict)}
    for name in raw:
        merged = _extended(name, raw, path, problems)
        if merged is None:
            continue
        if "executor" not in merged:
            fix = nearest(name, SETTINGS) if nearest(name, SETTINGS).startswith("did") else 'add executor = "local"'
            problems.append(Problem(f"profile [{name}] names no executor", str(path), fix))
            continue
        profiles[name] = merged
    if problems:
        raise UserError(*problems)
    return Environment(path.parent, path, settings["wandb"], settings["artifacts"], profiles)


def _settings(name: str, table: Any, path: Path, problems: list[Problem]) -> dict[str, str]:
    if not isinstance(table, dict):
        problems.append(Problem(f"[{name}] must be a table", str(path)))
        return {}
    for key, value in table.items():
        if key not in SETTINGS[name]:
            problems.append(Problem(f"unknown key '{key}' in [{name}]", str(path), nearest(key, SETTINGS[name])))
        elif not isinstance(value, str) or not value:
            problems.append(Problem(f"[{name}] {key} must be a non-empty string, not {value!r}", str(path)))
    return table


def _mirror_problems(wandb: Mapping[str, Any], path: Path) -> list[Problem]:
    """What the mirror could not use."""
    problems = []
    if wandb and "project" not in wandb:
        problems.append(Problem("[wandb] names no project", str(path), 'add project = "..."'))
    if wandb.get("upload", UPLOADS[0]) not in UPLOADS:
        fix = nearest(str(wandb["upload"]), UPLOADS)
        problems.append(Problem(f"[wandb] upload = {wandb['upload']!r}", str(path), fix))
    for key in ("data_name", "model_name"):
        try:
            str(wandb.get(key, "")).format(stage="", name="")
        except (KeyError, IndexError, ValueError):
            fix = "{stage} and {name} stand for themselves, no other braces"
            problems.append(Problem(f"[wandb] {key} = {wandb[key]!r} is no template", str(path), fix))
    return problems


def _extended(name: str, raw: Mapping[str, Tree], path: Path, problems: list[Problem]) -> Tree | None:
    """The profile over everything that it extends, nearest first; None (and a problem) when the chain is broken."""
    chain: list[str] = []
    current = name
    while True:
        if current in chain:
            circle = " -> ".join([*chain[chain.index(current) :], current])
            if current == name and name == min(chain):  # said once, by the first of the circle
                problems.append(Problem(f"profiles extend each other in a circle: {circle}", str(path)))
            return None
        chain.append(current)
        parent = raw[current].get("extends")
        if parent is None:
            break
        if not isinstance(parent, str) or parent not in raw:
            if current == name:
                fix = nearest(str(parent), [p for p in raw if p != name])
                problems.append(Problem(f"profile [{name}] extends unknown profile {parent!r}", str(path), fix))
            return None
        current = parent
    merged: Tree = {}
    for link in reversed(chain):
        merged = merge(merged, raw[link])
    merged.pop("extends", None)
    return merged
