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
from nemotron_recipes.data.files import listing_digest
from nemotron_recipes.data.remote import is_remote
from nemotron_recipes.data.template import BUILTIN as BUILTIN_TEMPLATES
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.executors.remote import transport
from nemotron_recipes.planning import there
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
            return Artifact.from_tree(transport.call(there.checkpoint, self._path(reference)))
        if kind == "template":
            return self._template(reference)
        if kind in ("model", "tokenizer") and HUB_NAME.fullmatch(reference) and not self._lies_here(reference):
            return self._hub(reference, kind)
        return Artifact.from_tree(transport.call(there.path_input, self._path(reference), kind))

    def _path(self, reference: str) -> str:
        """Where a path leads: from the current folder; on another machine there is none."""
        host = transport.current().name
        if not host:
            return os.path.abspath(self.cwd / os.path.expanduser(reference))
        if not reference.startswith("/"):
            fix = "write its full path there, or copy it there first: inputs do not travel"
            raise UserError(Problem(f"{reference!r} is looked for on {host}", fix=fix))
        return os.path.normpath(reference)

    def _lies_here(self, reference: str) -> bool:
        """Whether ORG/NAME is a path; one of another machine would be a full one."""
        return not transport.current().name and os.path.exists(self._path(reference))

    def _stored(self, reference: str) -> Artifact:
        name, _, version = reference.partition(":")
        if not version and name in self.produced:
            return self.produced[name]
        root = str(self.store.root)
        made_by = () if transport.call(there.versions, root, name) else self.makers(name)
        if made_by:
            what = f"no artifact '{name}' in the store yet"
            raise UserError(Problem(what, root, f"make it first: {made_by[0]}"))
        return Artifact.from_tree(transport.call(there.stored, root, reference))

    def made(self, fingerprint: str, slot: str, name: str) -> Artifact | None:
        """The newest version of a name that a stage of this fingerprint made."""
        found = transport.call(there.made, str(self.store.root), fingerprint, slot, name)
        return Artifact.from_tree(found) if found else None

    def _remote(self, reference: str) -> Artifact:
        if self.offline:
            raise UserError(Problem(f"{reference} can't be looked at with --offline", fix="leave --offline out"))
        return Artifact("remote", "data", uri=reference, digest=listing_digest(reference))

    def _template(self, reference: str) -> Artifact:
        if reference in BUILTIN_TEMPLATES:
            return Artifact("builtin", "template", reference)
        path = self._path(reference)
        if not transport.call(there.exists, path):
            fix = nearest(reference, BUILTIN_TEMPLATES) + " or give the path of a .jinja file"
            raise UserError(Problem(f"no chat template '{reference}'", fix=fix))
        return Artifact.from_tree(transport.call(there.path_input, path, "template"))

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


def _sample(reference: str) -> Artifact:
    from nemotron_recipes.tiny.tasks import TASKS

    task = reference.removeprefix("sample:")
    if task not in TASKS:
        raise UserError(Problem(f"unknown sample task '{task}'", fix=nearest(task, TASKS)))
    return Artifact("builtin", "data", reference)
