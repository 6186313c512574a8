"""Data sets on the hub: which files they have, and the rows of those that `datasets` alone can read.

JSON Lines are read as the files that they are (readers.py). `datasets` would give each split the columns of the first,
and ends where a field's type changes on the way: of the published SFT sets some have such fields.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from nemotron_recipes.data.files import KINDS
from nemotron_recipes.errors import Problem, UserError

LONGEST = 400  # characters of an error


@dataclass(frozen=True)
class HubFiles:
    """`splits`: name -> addresses of its files, both in the data set's own order. `whole`: the splits that `datasets`
    can be asked for, of the configuration `subset`."""

    splits: dict[str, list[str]]
    subset: str | None
    whole: frozenset[str]


def hub_files(name: str, subset: str | None, revision: str | None) -> HubFiles:
    """`subset` is a configuration of the data set; or, as in the blends that NVIDIA publishes, a split of the usual
    one, the name of a file without its ending, or a folder. UserError: it is none of these; `datasets` is missing; or
    the hub doesn't give the data."""
    try:
        every = _files(name, subset, revision)
        return HubFiles(every, subset, frozenset(every))
    except UserError:
        if subset is None:
            raise
        every = _files(name, None, revision)
        found = {
            split: places if split == subset else [place for place in places if subset in _names_of(place)]
            for split, places in every.items()
        }
        found = {split: places for split, places in found.items() if places}
        if not found:
            raise
        return HubFiles(found, None, frozenset(split for split in found if found[split] == every[split]))


def hub_stream(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    """A `datasets.IterableDataset`. UserError: as `hub_files`."""
    return _ask(
        name, lambda datasets: datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
    )


def hub_rows(name: str, subset: str | None, split: str, revision: str | None, most: int) -> int:
    """How many rows a split has; no more than `most` are read. UserError: as `hub_stream`."""
    try:
        with closing(iter(hub_stream(name, subset, split, revision))) as rows:
            return sum(1 for _ in islice(rows, most))
    except (OSError, ValueError) as error:
        raise hub_error(name, error) from None


def _files(name: str, configuration: str | None, revision: str | None) -> dict[str, list[str]]:
    builder = _ask(name, lambda datasets: datasets.load_dataset_builder(name, configuration, revision=revision))
    found = {str(split): list(map(str, places)) for split, places in (builder.config.data_files or {}).items()}
    if not found:
        raise UserError(Problem(f"hf://{name} holds no data files", fix="check the name"))
    return found


def _names_of(place: str) -> tuple[str, ...]:
    """The name of a file without its ending, and those of its folders."""
    *folders, file = PurePosixPath(place).parts
    ending = max((suffix for suffix in KINDS if file.endswith(suffix)), key=len, default="")
    return (*folders, file.removesuffix(ending))


def _ask(name: str, question: Callable[[Any], Any]) -> Any:
    try:
        import datasets
    except ImportError:
        what = f"hf://{name}: reading from the hub needs the 'datasets' library"
        raise UserError(Problem(what, fix="pip install 'nemotron-recipes[data]'")) from None
    try:
        return question(datasets)
    except (OSError, ValueError) as error:
        raise hub_error(name, error) from None


def hub_error(name: str, error: Exception) -> UserError:
    """What the hub or its library says, in one line that is no page."""
    lines = str(error).splitlines() or [type(error).__name__]
    said = lines[0] if len(lines[0]) <= LONGEST else f"{lines[0][:LONGEST]} ..."
    return UserError(Problem(f"hf://{name}: {said}", fix="check name, subset, hub_split and the network"))
