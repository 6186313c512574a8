"""The worker of data preparation stages: adapts a worker file to `nemotron_recipes.data`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemotron_recipes.data.fetch import fetch_tokenizer
from nemotron_recipes.data.files import listing_digest
from nemotron_recipes.data.gates.build import build_gates
from nemotron_recipes.data.job import Hub, Job, Progress, Report
from nemotron_recipes.data.metadata import write_metadata
from nemotron_recipes.data.prepare import prepare, prepare_part
from nemotron_recipes.data.settings import Settings, read_settings
from nemotron_recipes.data.template import NO_TEMPLATE, template_source
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.spec import Tree
from nemotron_recipes.worker.context import Context

KEYS = ("method", "data")
SLOT = "data"
PROGRESS_INTERVAL = 2.0  # seconds


def run(config: Tree, ctx: Context) -> None:
    """Prepare the data of a worker file (`method`, `data`) into the output `data`. UserError: the file, or the rows."""
    if ctx.world_size != 1:
        raise UserError(Problem(f"data prep is one process, not {ctx.world_size}"))
    progress = _Progress()
    with _job(config, ctx) as job:
        output = ctx.output(SLOT)
        report = prepare(job, output, progress)
    metadata = write_metadata(job, report, output)
    total, splits = report.total, report.splits.values()
    ctx.results |= {
        "rows_read": total.read,
        "rows_written": total.written,
        "rows_dropped": sum(total.dropped.values()),
        "packs": sum(split.packs for split in splits),
        "tokens": sum(split.tokens for split in splits),
    }
    ctx.metadata |= {name: metadata[name] for name in ("method", "format", "splits", "key")}
    progress.last(_summary(metadata, report))


def run_part(config: Tree, ctx: Context, part: int, parts: int) -> None:
    """Do part `part` (from 0) of `parts` of the shards beforehand, into the store, from where `run` takes them over.
    UserError: the file, or the rows."""
    progress = _Progress()
    with _job(config, ctx) as job:
        done = prepare_part(job, part, parts, progress)
    reused = f", {done.reused} of them by an earlier run" if done.reused else ""
    progress.last(f"part {part} of {parts}: {done.shards} of {done.of} shards are done{reused}; {done.rows} rows")


@contextmanager
def _job(config: Tree, ctx: Context) -> Iterator[Job]:
    """What a worker file asks for, while the tokenizer that may have to be made for it is there."""
    unknown = [Problem(f"unknown key '{key}'", fix=nearest(str(key), KEYS)) for key in config if key not in KEYS]
    if unknown:
        raise UserError(*unknown)
    method = config.get("method")
    settings = read_settings(config.get("data"), method)
    with tempfile.TemporaryDirectory(prefix="tokenizer-", dir=ctx.dir.path) as scratch:
        yield Job(
            method=str(method),
            settings=settings,
            locations=tuple(_location(index, settings, ctx) for index in range(len(settings.sources))),
            tokenizer=_tokenizer(settings.tokenizer, ctx, Path(scratch)),
            template_source=_template(settings, ctx),
            gates=build_gates(settings.gates, _evaluations(settings, ctx)),
            spools=ctx.store.root / ".spools",
        )


def _location(index: int, settings: Settings, ctx: Context) -> Path | str | Hub | None:
    key = f"data.sources.{index}.path"
    if key in ctx.inputs:
        return ctx.inputs[key]
    artifact = ctx.artifacts.get(key)
    if artifact is not None and artifact.source == "hub":
        return Hub(artifact.name, artifact.revision)
    if artifact is not None and artifact.source == "remote":
        if listing_digest(artifact.uri) != artifact.digest:
            raise UserError(Problem(f"{artifact.uri} has changed since it was planned", fix="plan again"))
        return artifact.uri
    if settings.sources[index].path.startswith("sample:"):
        return None
    raise UserError(Problem(f"the worker file has no input {key} for {settings.sources[index].path}"))


def _evaluations(settings: Settings, ctx: Context) -> tuple[Path, ...]:
    """Where the files of the contamination gate lie."""
    section = settings.gates.contamination if settings.gates else None
    found = []
    for index, reference in enumerate(section.files if section else ()):
        location = ctx.inputs.get(f"data.gates.contamination.files.{index}")
        if location is None:
            what = f"data.gates.contamination.files.{index}: {reference} is not on this machine"
            raise UserError(Problem(what, fix="give a .jsonl file, a folder with some, or artifact:NAME"))
        found.append(location)
    return tuple(found)


def _tokenizer(reference: str, ctx: Context, scratch: Path) -> Path:
    """The folder with tokenizer.json: given, made (tiny), or fetched from the hub."""
    key = "data.tokenizer"
    if key in ctx.inputs:
        return ctx.inputs[key]
    artifact = ctx.artifacts.get(key)
    if artifact is not None and artifact.source == "hub":
        return fetch_tokenizer(artifact.name, artifact.revision)
    if reference == "tiny":
        from nemotron_recipes.tiny.tokenizer import write_tokenizer

        write_tokenizer(scratch)
        return scratch
    raise UserError(Problem(f"the worker file has no input {key} for {reference}"))


def _template(settings: Settings, ctx: Context) -> str:
    if settings.chat_template is None:
        return NO_TEMPLATE
    return template_source(str(ctx.inputs.get("data.chat_template", settings.chat_template)))


def _summary(metadata: dict[str, Any], report: Report) -> str:
    total = metadata["total"]
    parts = [f"{total['rows_read']} rows read", f"{total['rows_written']} written"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in total["rows_dropped"].items())
    parts.append(f"{sum(total['rows_dropped'].values())} left out" + (f" ({dropped})" if dropped else ""))
    train = metadata["splits"]["train"]
    if train["packs"]:
        parts.append(f"{train['packs']} packs for training, {train['packing_efficiency']:.1%} full")
    if metadata["bad_rows"]:
        parts.append(f"bad rows are listed in bad_rows.jsonl ({metadata['bad_rows']})")
    if report.reused:
        parts.append(f"{report.reused} shards were there from an earlier run")
    if report.gate_seconds:
        parts.append("gates: " + ", ".join(f"{name} {s:.1f} CPU s" for name, s in report.gate_seconds.items()))
    return "; ".join(parts)


class _Progress(Progress):
    """A line every few seconds."""

    def __init__(self) -> None:
        self._started = self._shown = time.monotonic()

    def update(self, rows: int, share: float) -> None:
        now = time.monotonic()
        if now - self._shown < PROGRESS_INTERVAL and share < 1:
            return
        self._shown = now
        spent = now - self._started
        left = spent / share - spent if share else 0.0
        print(f"{rows} rows, {rows / spent:.0f} rows/s, {share:.0%}, about {left:.0f} s left", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)

    def last(self, summary: str) -> None:
        print(f"{summary}; {time.monotonic() - self._started:.1f} s", flush=True)
