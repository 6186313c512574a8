"""metadata.json: what was prepared from what, with which settings, and what came of it. Nothing in it depends on the
time, the machine or the place where the data lie, so equal inputs give equal bytes."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemotron_recipes.data.card import write_card
from nemotron_recipes.data.identity import LIBRARIES, code_digest
from nemotron_recipes.data.job import Job, Report
from nemotron_recipes.data.template import NO_TEMPLATE
from nemotron_recipes.fsio import file_digest, files_below, write_atomic
from nemotron_recipes.spec import sha256_text, to_json


def write_metadata(job: Job, report: Report, output: Path) -> dict[str, Any]:
    """Write the data card, then describe every file in `output`; returns what was written."""
    settings = job.settings
    splits = {}
    for name, split in report.splits.items():
        room = split.packs * settings.pack_size
        efficiency = {"packing_efficiency": round(split.tokens / room, 6)} if room else {}
        splits[name] = {**vars(split), **efficiency}
    lengths = {
        name: {key: split.pop(key) for key in ("length_counts", "length_tokens")} for name, split in splits.items()
    }
    metadata: dict[str, Any] = {
        "version": 1,
        "method": job.method,
        "format": "megatron_indexed" if job.method == "pretrain" else settings.format,
        "pack_size": settings.pack_size,
        "mask_alignment": "labels",  # position i says whether token i+1 is learned; the last of a sequence is 0
        "thinking": settings.thinking,
        "splits": splits,
        "lengths": lengths,  # of equal bins up to pack_size: how many sequences, and their tokens
        "sources": list(report.sources),
        "total": report.total.facts(),
        "bad_rows": report.bad_rows,
        "gates": {
            gate: {reason: {"rows": rows, "examples": examples} for reason, (rows, examples) in reasons.items()}
            for gate, reasons in report.gates.items()
        },
        "tokenizer": {"digest": report.encoder.digest, "vocabulary_size": report.encoder.vocabulary_size},
        "chat_template": {"file": "chat_template.jinja", "digest": report.encoder.template.digest}
        if job.template_source != NO_TEMPLATE
        else None,
        "key": _key(job, report),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    write_card(output, metadata, settings)
    metadata["files"] = {
        path.relative_to(output).as_posix(): {"digest": file_digest(path), "bytes": path.stat().st_size}
        for path in files_below(output)
    }
    text = json.dumps(metadata, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomic(output / "metadata.json", text.encode("utf-8", "backslashreplace"))
    return metadata


def _key(job: Job, report: Report) -> dict[str, str]:
    """What the result follows from: change one of these and the bytes may change, change none and they do not."""
    settings = asdict(job.settings)
    for source in settings["sources"]:
        source.pop("path")  # where it lies; `data` says what it holds
    for name in ("tokenizer", "chat_template", "on_bad_row", "workers"):
        settings.pop(name)
    if settings["gates"] and settings["gates"]["contamination"]:
        settings["gates"]["contamination"].pop("files")  # the gate's key says what they hold
    gates = [[gate.name, gate.key] for gate in job.gates.rows] + [[gate.name, gate.key] for gate in job.gates.corpus]
    return {
        "data": sha256_text(to_json([[file["identity"] for file in source["files"]] for source in report.sources])),
        "settings": sha256_text(to_json({"method": job.method, **settings, "gates_by_key": gates})),
        "tokenizer": report.encoder.digest,
        "template": report.encoder.template.digest,
        "code": code_digest(),
    }
