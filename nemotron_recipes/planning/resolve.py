"""Turn the references of a config into inputs pinned to something immutable. Reads only; never downloads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.hub import commit_of
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.config.schema import REFERENCES
from nemotron_recipes.data.files import is_remote, listing_digest
from nemotron_recipes.data.template import BUILTIN as BUILTIN_TEMPLATES
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.fsio import path_digest
from nemotron_recipes.rundir import latest_checkpoint
from nemotron_recipes.spec import Artifact, Tree

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = {"data": "dataset"}  # kind of an artifact -> kind of a repository; else a model


@dataclass
class Resolver:
    """`produced`: outputs of earlier stages of the same plan by artifact name, pending or already made."""

    store: Store
    cwd: Path
    makers: Callable[[str], tuple[str, ...]]  # artifact name -> commands that make it, for messages
    offline: bool = False
    produced: dict[str, Artifact] = field(default_factory=dict)

    def resolve_all(self, config: Tree, origin: Any) -> tuple[dict[str, Artifact], list[Problem]]:
        """Config key -> pinned input for every reference of a validated config; `origin(key)` says who set it."""
        inputs: dict[str, Artifact] = {}
        problems: list[Problem] = []
        for key, kind, reference in references(config):
            try:
                inputs[key] = self.resolve(reference, kind)
            except UserError as error:
                where = str(origin(key) or "")
                problems += [Problem(f"{key}: {p.what}", p.where or where, p.fix) for p in error.problems]
        return inputs, problems

    def resolve(self, reference: str, kind: str) -> Artifact:
        """One reference (docs/contracts.md). UserError: it names nothing that exists, or something of another kind."""
        if not reference:
            raise UserError(Problem("the reference is empty", fix="give a path, hf://ORG/NAME or artifact:NAME"))
        if reference.startswith("artifact:"):
            return _of_kind(self._stored(reference.removeprefix("artifact:")), kind)
        if reference == "tiny" and kind in ("model", "tokenizer"):
            return Artifact("builtin", kind, "tiny")
        if reference.startswith("sample:") and kind == "data":
            return _sample(reference)
        if reference.startswith("wandb:"):
            return self._wandb(reference.removeprefix("wandb:"), kind)
        if reference.startswith("hf://"):
            return self._hub(reference.removeprefix("hf://"), kind)
        if kind == "data" and is_remote(reference):
            return self._remote(reference)
        if kind == "checkpoint":
            return self._checkpoint(reference)
        if kind == "template":
            return self._template(reference)
        path = self._path(reference)
        if kind in ("model", "tokenizer") and HUB_NAME.fullmatch(reference) and not path.exists():
            return self._hub(reference, kind)
        return self._local(path, kind)

    def _path(self, reference: str) -> Path:
        return Path(os.path.abspath(self.cwd / os.path.expanduser(reference)))

    def _stored(self, reference: str) -> Artifact:
        name, _, version = reference.partition(":")
        if not version and name in self.produced:
            return self.produced[name]
        made_by = () if self.store.versions(name) else self.makers(name)
        if made_by:
            what = f"no artifact '{name}' in the store yet"
            raise UserError(Problem(what, str(self.store.root), f"make it first: {made_by[0]}"))
        return self.store.resolve(reference)

    def _local(self, path: Path, kind: str) -> Artifact:
        if kind in ("model", "tokenizer") and path.exists() and not path.is_dir():
            raise UserError(Problem(f"{path} is not a folder", fix=f"a {kind} is a Hugging Face folder"))
        if kind == "model" and path.is_dir() and not (path / "config.json").is_file():
            raise UserError(Problem(f"{path} holds no config.json", fix="a model is a Hugging Face folder"))
        try:
            return Artifact("path", kind, uri=str(path), digest=path_digest(str(path)))
        except FileNotFoundError:
            raise UserError(Problem(f"nothing at {path}", fix=_near(path))) from None
        except OSError as error:
            raise UserError(Problem(f"{error.filename or path} can't be read: {error.strerror}")) from None

    def _remote(self, reference: str) -> Artifact:
        if self.offline:
            raise UserError(Problem(f"{reference} can't be looked at with --offline", fix="leave --offline out"))
        return Artifact("remote", "data", uri=reference, digest=listing_digest(reference))

    def _checkpoint(self, reference: str) -> Artifact:
        path = self._path(reference)
        folder = path if path.name.startswith("iter_") else latest_checkpoint(path)
        if folder is None or not folder.is_dir():
            fix = "give an iter_NNNNNNN folder, or the folder that holds latest_checkpointed_iteration.txt"
            raise UserError(Problem(f"no whole checkpoint at {path}", fix=fix))
        return Artifact("path", "checkpoint", uri=str(folder), digest=path_digest(str(folder)))

    def _template(self, reference: str) -> Artifact:
        if reference in BUILTIN_TEMPLATES:
            return Artifact("builtin", "template", reference)
        path = self._path(reference)
        if not path.is_file():
            fix = nearest(reference, BUILTIN_TEMPLATES) + " or give the path of a .jinja file"
            raise UserError(Problem(f"no chat template '{reference}'", fix=fix))
        return self._local(path, "template")

    def _wandb(self, reference: str, kind: str) -> Artifact:
        if self.offline:
            return Artifact("wandb", kind, reference.partition(":")[0])
        from nemotron_recipes.mirror import pull

        return pull.describe(reference, kind)

    def _hub(self, reference: str, kind: str) -> Artifact:
        name, _, revision = reference.partition("@")
        if not HUB_NAME.fullmatch(name):
            raise UserError(Problem(f"'hf://{reference}' is not hf://ORG/NAME[@REVISION]"))
        if COMMIT.fullmatch(revision):
            return Artifact("hub", kind, name, revision=revision)
        if self.offline or os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
            return Artifact("hub", kind, name)
        return Artifact("hub", kind, name, revision=commit_of(name, revision or None, _REPOSITORY.get(kind, "model")))


def references(config: Tree) -> Iterator[tuple[str, str, str]]:
    """(key, kind, reference) for each reference that is set; list elements as `data.sources.0.path`."""
    for pattern, kind in REFERENCES[config["kind"]]:
        for key, value in _values(config, pattern.split("."), ""):
            if value is not None:
                yield key, kind, value


def _values(node: Any, parts: list[str], prefix: str) -> Iterator[tuple[str, Any]]:
    if not parts:
        yield prefix.rstrip("."), node
        return
    if node is None:  # a section that is left out
        return
    name, rest = parts[0], parts[1:]
    if name.endswith("[]"):
        name = name[:-2]
        for index, element in enumerate(node[name]):
            yield from _values(element, rest, f"{prefix}{name}.{index}.")
    else:
        yield from _values(node[name], rest, f"{prefix}{name}.")


def _of_kind(artifact: Artifact, kind: str) -> Artifact:
    """The artifact, when a config key that wants `kind` can use it: a model folder holds its tokenizer, too."""
    if artifact.kind in (("model", "tokenizer") if kind == "tokenizer" else (kind,)):
        return artifact
    raise UserError(Problem(f"{artifact.label} is of kind '{artifact.kind}', not '{kind}'", artifact.uri))


def _near(path: Path) -> str:
    """What to do where nothing lies at `path`."""
    if not path.parent.is_dir():
        return f"{path.parent} does not exist either"
    near = nearest(path.name, os.listdir(path.parent))
    return near if near.startswith("did") else "give a path that exists, hf://ORG/NAME or artifact:NAME"


def _sample(reference: str) -> Artifact:
    from nemotron_recipes.tiny.tasks import TASKS

    task = reference.removeprefix("sample:")
    if task not in TASKS:
        raise UserError(Problem(f"unknown sample task '{task}'", fix=nearest(task, TASKS)))
    return Artifact("builtin", "data", reference)
