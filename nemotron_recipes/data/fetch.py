"""A tokenizer from the hub."""

from __future__ import annotations

from pathlib import Path

from nemotron_recipes.errors import Problem, UserError


def fetch_tokenizer(name: str, revision: str | None) -> Path:
    """The folder with its tokenizer.json, downloaded if it isn't there yet. UserError: it can't be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json", revision=revision)).parent
    except (OSError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        what = f"the tokenizer of hf://{name} can't be fetched: {lines[0]}"
        raise UserError(Problem(what, fix="check the network and the access token, or give a local folder")) from None
