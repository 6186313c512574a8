"""What prepared data follow from: change one of these and the bytes may change, change none and they do not."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from nemotron_recipes.data.encoder import Encoder
from nemotron_recipes.data.job import Job
from nemotron_recipes.data.settings import SAMPLED
from nemotron_recipes.fsio import files_below, tree_digest
from nemotron_recipes.spec import to_json

LIBRARIES = ("numpy", "tokenizers", "jinja2", "orjson")
# Settings that what a shard becomes doesn't follow from: they act when shards are merged, or not at all.
_MERGED_LATER = (
    "sources",
    "blend",
    "columns",  # with each source
    "sample",
    "pack_size",
    "overlong",
    "format",
    "on_bad_row",
    "tokenizer",
    "chat_template",
    "workers",
    "gates",  # by their own keys
)


def spool_keys(job: Job, encoder: Encoder) -> list[str]:
    """What the spools of each source follow from, besides the content of a shard."""
    settings = {name: value for name, value in asdict(job.settings).items() if name not in _MERGED_LATER}
    gates = [[gate.name, gate.key] for gate in job.gates.rows]
    gates += [[gate.name, gate.key] for gate in job.gates.corpus]
    shared = [job.method, settings, gates, encoder.digest, encoder.template.digest, code_digest()]
    shared.append({name: version(name) for name in (*LIBRARIES, *({job.settings.engine} - {"tokenizers"}))})
    keys = []
    for source in job.settings.sources:
        weight = min(source.weight, 1.0) if job.method in SAMPLED else 1.0
        columns = asdict(source.columns or job.settings.columns)
        text = to_json([*shared, source.split, weight, columns])
        keys.append(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
    return keys


def code_digest() -> str:
    """Identity of the code that prepares: the sources and templates of this package."""
    root = Path(__file__).parent
    return tree_digest(root, [path for path in files_below(root) if path.suffix in (".py", ".jinja")])
