"""Blend files in the published format: which data sets, in which shares. A blend becomes `data.sources` of a plan.

{"datasets": [{"name", "path", "weight", "split", "subset", "text_field"}, ...]}
{"train": [...], "valid": [...], "test": [...]}
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemotron_recipes.data.settings import SPLITS, Source, read_section
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.spec import Tree

PARTS = {"datasets": None, "train": SPLITS[0], "valid": SPLITS[1], "test": SPLITS[2]}
# As published, and two of our own: fields of the rows by our names, and how many rows.
FIELDS = ("name", "path", "weight", "split", "subset", "text_field", "columns", "rows")


def read_blend(path: Path, method: str) -> list[Tree]:
    """The sources that a blend file names, as `data.sources` has them. UserError: everything that is wrong with it.

    `split` is the split of a hub data set that is read; without one all are. Other addresses have none. `text_field`
    matters where text is read, in pretraining; in the published files it stands beside chats too.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(Problem(f"data.blend: {path} can't be read: {error.strerror}")) from None
    except ValueError as error:
        raise UserError(Problem(f"data.blend: {path} is not JSON: {error}")) from None
    problems: list[Problem] = []
    lists = tree if isinstance(tree, dict) else {}
    if not lists:
        problems.append(Problem("data.blend holds no data sets", str(path), f"an object with {' or '.join(PARTS)}"))
    lists = {key: value for key, value in lists.items() if not str(key).startswith("_")}  # notes, as in published files
    for key in lists:
        if key not in PARTS:
            problems.append(Problem(f"data.blend: unknown key '{key}'", str(path), nearest(str(key), PARTS)))
    if "datasets" in lists and len(lists) > 1:
        problems.append(Problem("data.blend: 'datasets' and lists by split exclude each other", str(path)))
    sources = []
    for part, split in PARTS.items():
        entries = lists.get(part, [])
        if not isinstance(entries, list):
            problems.append(Problem(f"data.blend: {part} must be a list", str(path)))
            continue
        for number, entry in enumerate(entries):
            try:
                sources.append(_source(entry, split, method, path.parent, f"{part}.{number}"))
            except UserError as error:
                problems += [Problem(f"data.blend: {p.what}", str(path), p.fix) for p in error.problems]
    if not problems and not sources:
        problems.append(Problem("data.blend holds no data sets", str(path)))
    if problems:
        raise UserError(*problems)
    return sources


def _source(entry: Any, split: str | None, method: str, folder: Path, where: str) -> Tree:
    """A relative path is meant from the blend's folder."""
    if not isinstance(entry, dict):
        raise UserError(Problem(f"{where}: an object is expected, not {entry!r}"))
    unknown = [key for key in entry if key not in FIELDS and not str(key).startswith("_")]
    if unknown:
        raise UserError(*(Problem(f"{where}: unknown key '{key}'", fix=nearest(str(key), FIELDS)) for key in unknown))
    known = {key: entry[key] for key in ("name", "path", "weight", "subset", "rows") if entry.get(key) is not None}
    given = entry.get("path")
    on_hub = isinstance(given, str) and given.startswith("hf://")
    if isinstance(given, str) and "://" not in given and not given.startswith(("artifact:", "sample:", "wandb:")):
        known["path"] = str(folder / os.path.expanduser(given))
    if on_hub:
        known["hub_split"] = entry.get("split") or "all"
    elif entry.get("split") is not None:
        fix = "leave it out, or name its data under train, valid and test"
        raise UserError(Problem(f"{where}: split is for hub data sets; {given} has none", fix=fix))
    given_columns = entry.get("columns") or {}
    if not isinstance(given_columns, dict):
        fix = 'our name of each field and theirs: {"prompt": "question"}'
        raise UserError(Problem(f"{where}.columns: an object is expected, not {given_columns!r}", fix=fix))
    columns = dict(given_columns)
    if method == "pretrain" and entry.get("text_field") is not None:
        columns.setdefault("text", entry["text_field"])
    if columns:
        known["columns"] = columns
    return asdict(read_section(Source, {**known, "split": split}, where))
