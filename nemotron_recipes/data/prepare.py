"""Data preparation as a whole: read, normalise, place in a split, render, encode, pack, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nemotron_recipes.data.chat import ChatEncoder
from nemotron_recipes.data.encoder import Encoder
from nemotron_recipes.data.ledger import Account, BadRows
from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.rows import RowReader
from nemotron_recipes.data.settings import Settings, Source
from nemotron_recipes.data.sinks import PackedSink, Placed, RowsSink, Sink, SplitFacts
from nemotron_recipes.data.sources import Hub, Line, find_files, read_files, read_hub, read_sample
from nemotron_recipes.data.splits import content_key, copies, split_of
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import file_digest

BLOCK = 256  # rows encoded at once
# Reasons that are a choice, not a defect of the row: counted, but not listed as bad.
POLICY = frozenset({"overlong", "nothing_to_train", "sampled_out"})
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """What to prepare. `locations`: for each source a path (file, folder, glob), a Hub, or None for a sample."""

    method: str
    settings: Settings
    locations: tuple[Path | Hub | None, ...]
    tokenizer: Path  # folder
    template_source: str


@dataclass(frozen=True)
class Report:
    """The facts of a finished preparation. `sources`: name, identity of the contents, and the counts."""

    sources: tuple[dict[str, Any], ...]
    total: Account
    splits: dict[str, SplitFacts]
    encoder: Encoder
    bad_rows: int


def prepare(job: Job, output: Path, progress: Progress = lambda rows: None) -> Report:
    """Write everything but metadata.json into the empty folder `output`. `progress` hears how many rows were read.

    UserError: nothing to train on, or, with `on_bad_row: fail`, a bad row. After an error `output` holds parts; the
    caller discards it.
    """
    settings = job.settings
    encoder = Encoder(job.tokenizer, job.template_source)
    chat = ChatEncoder(encoder, settings.thinking)
    reader = RowReader(job.method, settings.columns, settings.answer_pattern, encoder.template.renders_reasoning)
    sink: Sink
    sink = PackedSink(settings, chat, output) if job.method == "sft" else RowsSink(job.method, settings, chat, output)
    sources = []
    total = Account()
    try:
        with (output / "bad_rows.jsonl").open("w", encoding="utf-8", newline="\n") as handle:
            bad_rows = BadRows(handle, fail=settings.on_bad_row == "fail")
            for index, source in enumerate(settings.sources):
                name = source.name or f"source-{index}"
                lines, identity = _open(job, index)
                before = total.read
                account = _read(lines, _Placing(reader, source, settings), sink, bad_rows, name, before, progress)
                sources.append({"name": name, "files": identity, **account.facts()})
                total += account
        if not sink.splits["train"].rows:
            raise _nothing(total)
        sink.finish()
    finally:
        sink.close()
    (output / "chat_template.jinja").write_text(job.template_source, encoding="utf-8", newline="\n")
    return Report(tuple(sources), total, sink.splits, encoder, bad_rows.count)


@dataclass(frozen=True)
class _Placing:
    """Decides a row's split and how often it is taken."""

    reader: RowReader
    source: Source
    settings: Settings

    def place(self, line: Line) -> Placed | BadRow:
        if line.bad is not None:
            return line.bad
        try:
            row = self.reader.read(line.value)
        except BadRow as bad:
            return bad
        key = content_key(row)
        split = self.source.split or split_of(key, self.settings.splits)
        times = copies(key, self.source.weight) if split == "train" else 1
        return Placed(row, split, times) if times else BadRow("sampled_out", "")


def _read(
    lines: Iterator[Line],
    placing: _Placing,
    sink: Sink,
    bad_rows: BadRows,
    name: str,
    before: int,
    progress: Progress,
) -> Account:
    """Take one source to its end. `before`: rows read from earlier sources."""
    account = Account()
    while block := list(islice(lines, BLOCK)):
        placed = [placing.place(line) for line in block]
        written = iter(sink.add([one for one in placed if isinstance(one, Placed)], account))
        for line, one in zip(block, placed, strict=True):
            left_out = one if isinstance(one, BadRow) else next(written)
            account.read += 1
            if left_out is None:
                account.written += 1
                continue
            account.dropped[left_out.reason] += 1
            if left_out.reason not in POLICY:
                bad_rows.add(name, line, left_out)
        progress(before + account.read)
    return account


def _open(job: Job, index: int) -> tuple[Iterator[Line], list[dict[str, Any]]]:
    """Rows of a source, and what identifies its contents."""
    source, location = job.settings.sources[index], job.locations[index]
    limit = min((n for n in (source.rows, job.settings.sample) if n is not None), default=None)
    if isinstance(location, Hub):
        identity = {"name": location.name, "revision": location.revision, "subset": source.subset}
        return read_hub(location, source, limit), [{**identity, "split": source.hub_split}]
    if location is None:
        assert limit is not None  # settings.cross_problems asks for it
        return read_sample(source, job.method, limit), [{"name": source.path, "seed": source.seed, "rows": limit}]
    files = find_files(location)
    return read_files(files, limit), [{"name": name, "digest": file_digest(path)} for name, path in files]


def _nothing(total: Account) -> UserError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(total.dropped.items()))
    what = f"nothing is left to train on: {total.read} rows read, {total.written} of them for validation and test"
    fix = "data.on_bad_row=fail shows the first bad row; data.columns names fields, data.pack_size limits length"
    return UserError(Problem(what + (f"; left out: {reasons}" if reasons else ""), fix=fix))
