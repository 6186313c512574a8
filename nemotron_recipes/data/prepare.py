"""Data preparation as a whole: cut the sources into shards, prepare each on its own, merge in order, pack, write.

What a shard became is a spool below `spools`, named by what it follows from. A run that was killed leaves whole spools
only, and the next run takes them over; so does one that packs to another size.
"""

from __future__ import annotations

import errno
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from nemotron_recipes.data.cuts import SHARD_BYTES, cut_job
from nemotron_recipes.data.files import Input, find_files
from nemotron_recipes.data.identity import spool_keys
from nemotron_recipes.data.job import Hub, Job, PartDone, Progress, Report
from nemotron_recipes.data.ledger import Account, BadRows
from nemotron_recipes.data.merge import Merged, Merger
from nemotron_recipes.data.outputs import SplitWriter
from nemotron_recipes.data.pool import Task, run_here, run_parallel, usable_cpus
from nemotron_recipes.data.settings import SPLITS
from nemotron_recipes.data.shard_encoder import Done, Recipe, ShardEncoder
from nemotron_recipes.data.shards import Shard
from nemotron_recipes.data.spool import Spool
from nemotron_recipes.data.spools import Spools
from nemotron_recipes.data.template import NO_TEMPLATE
from nemotron_recipes.errors import JobFailed, Problem, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for a file, or for one so large


def prepare(job: Job, output: Path, progress: Progress | None = None) -> Report:
    """Write everything but metadata.json into the empty folder `output`.

    UserError: nothing to train on, a damaged input, or, with `on_bad_row: fail`, a bad row. JobFailed: the disk is
    full, or a process died. After an error `output` holds parts; the caller discards it.
    """
    try:
        return _Preparation(job, output, progress or Progress()).run()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise JobFailed(f"the data can't be written: {error}; what is done stays done") from None


def prepare_part(job: Job, part: int, parts: int, progress: Progress | None = None) -> PartDone:
    """Make the spools of each `parts`-th shard, from number `part` on; `prepare` of the same job takes them over.

    Parts share nothing but the folder of spools, so they may run on different machines, at any time, again and again.
    UserError, JobFailed: as `prepare`."""
    if job.spools is None:
        raise ValueError("without a folder of spools nobody could take over what a part has done")
    return _Preparation(job, job.spools, progress or Progress()).run_part(part, parts)


class _Preparation:
    def __init__(self, job: Job, output: Path, progress: Progress):
        self.job = job
        self.settings = job.settings
        self.output = output
        self.progress = progress
        self.recipe = Recipe(job.method, job.settings, job.tokenizer, job.template_source, job.gates)
        self.files = [find_files(str(where)) if isinstance(where, (Path, str)) else [] for where in job.locations]
        self.shards = cut_job(job, self.files)  # in input order
        self.warnings: list[str] = []
        self.gate_seconds: dict[str, float] = {}
        self.reused = 0
        self.rows = 0  # so far

    def run(self) -> Report:
        shards = self.shards
        workers, encoder = self._encoder(shards)
        before = [_state(file) for file in self._all_files()]
        with ExitStack() as stack:
            scratch = self.output / ".spool"
            folder, keys_of = self.job.spools or scratch, spool_keys(self.job, encoder.encoder)
            spools = stack.enter_context(Spools(folder, keys_of, repr(shards), self.progress.note))
            identities = stack.enter_context(ThreadPoolExecutor(1)).submit(self._identities)
            keys = self._encode(encoder, shards, spools, workers)
            made = [Spool(spools.folder / key) for key in keys]
            merged, bad_rows = self._merge(made, scratch)
            stack.callback(merged.close)
            if not merged.rows["train"]:
                raise _nothing(_total(merged), len(self._all_files()))
            splits = SplitWriter(self.job, self.output, scratch).write(merged, made)
            sources = self._sources(merged, identities.result())
        changed = [file.place for file, state in zip(self._all_files(), before, strict=True) if _state(file) != state]
        if changed:
            raise UserError(Problem(f"changed while it was read: {', '.join(changed)}", fix="run again"))
        shutil.rmtree(scratch, ignore_errors=True)
        if self.job.template_source != NO_TEMPLATE:
            (self.output / "chat_template.jinja").write_text(self.job.template_source, encoding="utf-8", newline="\n")
        return Report(
            tuple(sources),
            _total(merged),
            splits,
            encoder.encoder,
            bad_rows,
            merged.gates,
            self.gate_seconds,
            tuple(self.warnings),
            self.reused,
        )

    def run_part(self, part: int, parts: int) -> PartDone:
        shards = self.shards
        mine = shards[part::parts]
        if not mine:
            return PartDone(0, len(shards), 0, 0)
        workers, encoder = self._encoder(mine)
        with Spools(self.output, spool_keys(self.job, encoder.encoder), repr(mine), self.progress.note) as spools:
            self._encode(encoder, mine, spools, workers)
        return PartDone(len(mine), len(shards), self.rows, self.reused)

    def _encoder(self, shards: list[Shard]) -> tuple[int, ShardEncoder]:
        """How many processes, and the encoder of this one. Where others do the work, it needs no second engine, only
        who the tokenizer is."""
        workers = min(self.settings.workers or min(usable_cpus(), _worth(shards)), len(shards))
        settings = self.settings if workers <= 1 else replace(self.settings, engine="tokenizers")
        return workers, ShardEncoder(replace(self.recipe, settings=settings))

    def _encode(self, encoder: ShardEncoder, shards: list[Shard], spools: Spools, workers: int) -> list[str]:
        """Every shard's spool is there; returns their names in order."""
        tasks = [Task(number, shard, spools.key(shard.source)) for number, shard in enumerate(shards)]
        if workers > 1:
            running = run_parallel(self.recipe, tasks, spools.folder, workers)
        else:
            running = run_here(encoder, tasks, spools.folder)
        total = sum(shard.size for shard in shards) or 1
        keys: dict[int, str] = {}
        size = 0
        with closing(running):
            for task, done in running:
                keys[task.number] = done.key
                size += task.shard.size
                self._take(done)
                self.progress.update(self.rows, size / total)
        return [keys[number] for number in sorted(keys)]

    def _take(self, done: Done) -> None:
        self.rows += done.rows
        self.reused += done.reused
        if done.warning:
            self.warnings.append(done.warning)
            self.progress.note(f"warning: {done.warning}")
        for gate, seconds in done.seconds.items():
            self.gate_seconds[gate] = self.gate_seconds.get(gate, 0.0) + seconds

    def _merge(self, spools: list[Spool], scratch: Path) -> tuple[Merged, int]:
        names = [source.name or f"source-{index}" for index, source in enumerate(self.settings.sources)]
        splits = {"sft": SPLITS[1:], "pretrain": ()}.get(self.job.method, SPLITS)
        with ExitStack() as stack:
            handle = stack.enter_context((self.output / "bad_rows.jsonl").open("w", encoding="utf-8", newline="\n"))
            bad_rows = BadRows(handle, fail=self.settings.on_bad_row == "fail")
            rows: dict[str, IO[bytes]] = {}
            for split in splits:
                (self.output / split).mkdir(parents=True, exist_ok=True)
                rows[split] = stack.enter_context((self.output / split / "rows.jsonl").open("wb"))
            # With `fail` the shards after the bad row are missing, and the merge ends before it asks for them.
            shards = self.shards[: len(spools)]
            merger = Merger(self.job.method, self.settings, names, shards, spools, bad_rows, rows, scratch)
            return merger.run(self.job.gates.corpus), bad_rows.count

    def _identities(self) -> list[list[str]]:
        return [[file.identity for file in files] for files in self.files]

    def _all_files(self) -> list[Input]:
        return [file for files in self.files for file in files]

    def _sources(self, merged: Merged, identities: list[list[str]]) -> list[dict[str, Any]]:
        """For each source: its name, its files with their counts, the counts of all."""
        result = []
        for index, source in enumerate(self.settings.sources):
            accounts = {file: account for (number, file), account in merged.accounts.items() if number == index}
            where = self.job.locations[index]
            entries: list[dict[str, Any]]
            if isinstance(where, Hub):
                facts = {"name": where.name, "revision": where.revision, "subset": source.subset}
                parts = {shard.file: shard for shard in self.shards if shard.source == index}
                entries = [{**facts, "split": part.task[1], "file": part.file_of_hub} for part in parts.values()]
            elif where is None:
                entries = [{"name": source.path, "seed": source.seed}]
            else:
                files = self.files[index]
                entries = [{"name": f.name, "digest": d} for f, d in zip(files, identities[index], strict=True)]
            counted = [{"identity": entry, **accounts.get(n, Account()).facts()} for n, entry in enumerate(entries)]
            total = sum(accounts.values(), Account())
            result.append({"name": source.name or f"source-{index}", "files": counted, **total.facts()})
        return result


def _worth(shards: list[Shard]) -> int:
    """How many processes the work is worth: to start one takes about as long as a shard of text. Nobody knows how large
    a shard of the hub is."""
    return 1 + sum(SHARD_BYTES if shard.kind == "hub" else shard.size for shard in shards) // SHARD_BYTES


def _state(file: Input) -> Any:
    try:
        return file.state
    except OSError as error:
        return str(error)


def _total(merged: Merged) -> Account:
    return sum(merged.accounts.values(), Account())


def _nothing(total: Account, files: int) -> UserError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(total.dropped.items()))
    what = f"nothing is left to train on: {total.read} rows read, {total.written} of them for validation and test"
    fix = "data.on_bad_row=fail shows the first bad row; data.columns names fields, data.pack_size limits length"
    if files and not total.read:
        fix = f"{files} file(s) hold no row at all: look whether they are whole"
    return UserError(Problem(what + (f"; left out: {reasons}" if reasons else ""), fix=fix))
