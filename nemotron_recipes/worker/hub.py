"""The folder of a model, tokenizer or data set on this machine, wherever it was named from."""

from __future__ import annotations

from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.worker.context import Context


def folder_of(context: Context, key: str) -> Path:
    """Of a store or path input, or of the hub's cache at the pinned revision, fetched there unless it is in it.

    UserError: it is not in the cache, and the hub can't be asked or has no such revision.
    """
    if key in context.inputs:
        return context.inputs[key]
    from huggingface_hub import snapshot_download

    wanted = context.artifacts[key]
    kind = "dataset" if wanted.kind == "data" else "model"
    try:
        return Path(snapshot_download(wanted.name, repo_type=kind, revision=wanted.revision))
    except (OSError, ValueError) as error:  # no route, a time-out, offline and not in the cache, no such revision
        said = (str(error).splitlines() or [type(error).__name__])[0]
        data = " --data" if kind == "dataset" else ""
        fix = f"fetch it once where there is a network: nemotron models fetch {wanted.name}@{wanted.revision}{data}"
        raise UserError(Problem(f"{wanted.label} can't be had here: {said}", key, fix)) from None
