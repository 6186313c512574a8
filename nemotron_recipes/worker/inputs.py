"""From the pinned or pending inputs of the worker file to verified paths."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import path_digest
from nemotron_recipes.mirror.pull import ensure
from nemotron_recipes.spec import Artifact


def resolve_inputs(
    inputs: dict[str, Artifact], store: Store, verify: bool
) -> tuple[dict[str, Path], dict[str, Artifact]]:
    """(paths, exact artifacts) by config key. Raises UserError with every input that is missing or has changed.

    verify: also read all data and compare digests; one rank does, since its failure stops them all before the first
    collective step. Hub and builtin inputs have no path: the module fetches or makes them.
    """
    paths: dict[str, Path] = {}
    artifacts: dict[str, Artifact] = {}
    problems: list[Problem] = []
    for key, pinned in inputs.items():
        try:
            artifact = ensure(store, pinned, download=verify) if pinned.source == "wandb" else _exact(pinned, store)
            if artifact.source == "store":
                if verify:
                    store.verify(artifact)
                paths[key] = store.content(artifact)
            elif artifact.source == "path":
                paths[key] = _existing(artifact, verify)
            artifacts[key] = artifact
        except UserError as error:
            problems.extend(Problem(f"input {key}: {p.what}", p.where, p.fix) for p in error.problems)
    if problems:
        raise UserError(*problems)
    return paths, artifacts


def _exact(pinned: Artifact, store: Store) -> Artifact:
    """The registered version behind a store or pending input; others are exact already."""
    if pinned.source == "store":
        found = store.resolve(f"{pinned.name}:v{pinned.version}")
        if pinned.digest and found.digest != pinned.digest:
            raise UserError(
                Problem(
                    f"{pinned.label} isn't what was planned: its digest is {found.digest}, planned {pinned.digest}",
                    str(store.root),
                    "plan again",
                )
            )
        return found
    if pinned.source == "pending":
        assert pinned.producer is not None
        made = store.find_output(pinned.producer)
        if made is None:
            raise UserError(
                Problem(
                    f"run {pinned.producer.run} has registered no output '{pinned.producer.slot}' of stage"
                    f" {pinned.producer.stage} with fingerprint {pinned.producer.fingerprint}",
                    str(store.root),
                    f"look at stage {pinned.producer.stage}: nemotron runs show {pinned.producer.run}",
                )
            )
        return made
    return pinned


def _existing(artifact: Artifact, verify: bool) -> Path:
    """The path of a path input: a file, a folder, or a glob that matches something; unchanged since it was planned."""
    if not os.path.exists(artifact.uri) and not glob.glob(artifact.uri, recursive=True):
        raise UserError(Problem(f"{artifact.uri} doesn't exist here", fix="mount or copy it where the stage runs"))
    if verify and artifact.digest:
        actual = path_digest(artifact.uri)
        if actual != artifact.digest:
            what = f"{artifact.uri} has changed: its content is {actual}, when planned it was {artifact.digest}"
            raise UserError(Problem(what, fix="plan again"))
    return Path(artifact.uri)
