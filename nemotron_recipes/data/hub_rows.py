"""Data sets on the hub, streamed: what `datasets` is asked."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from typing import Any

from nemotron_recipes.errors import Problem, UserError


def hub_stream(name: str, subset: str | None, split: str | None, revision: str | None) -> Any:
    """A `datasets.IterableDataset`; without a split all of them by name.

    UserError: `datasets` is missing, or the hub doesn't give the data."""
    try:
        from datasets import load_dataset
    except ImportError:
        what = f"hf://{name}: reading from the hub needs the 'datasets' library"
        raise UserError(Problem(what, fix="pip install 'nemotron-recipes[data]'")) from None
    try:
        return load_dataset(name, subset, split=split, revision=revision, streaming=True)
    except (OSError, ValueError) as error:
        raise hub_error(name, error) from None


def hub_splits(name: str, subset: str | None, revision: str | None) -> list[str]:
    """The names of a hub data set's splits, in its own order. UserError: as `hub_stream`."""
    return list(hub_stream(name, subset, None, revision))


def hub_rows(name: str, subset: str | None, split: str, revision: str | None, most: int) -> int:
    """How many rows a split has; no more than `most` are read. UserError: as `hub_stream`."""
    try:
        with closing(iter(hub_stream(name, subset, split, revision))) as rows:
            return sum(1 for _ in islice(rows, most))
    except (OSError, ValueError) as error:
        raise hub_error(name, error) from None


def hub_error(name: str, error: Exception) -> UserError:
    """What the hub or its library says, in one line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return UserError(Problem(f"hf://{name}: {lines[0]}", fix="check name, subset, hub_split and the network"))
