"""Data preparation as a whole: cut the sources into shards, prepare each on its own, merge in order, pack, write.

What a shard became is a spool below `spools`, named by what it follows from. A run that was killed leaves whole spools
only, and the next run takes them over; so does one that packs to another size.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

from nemotron_recipes.data.encoder import Encoder
from nemotron_recipes.data.files import Input, find_files
from nemotron_recipes.data.gates import Gates
from nemotron_recipes.data.indexed import slug, write_blend, write_indexed
from nemotron_recipes.data.ledger import Account, BadRows
from nemotron_recipes.data.merge import Merged, Merger, Sequences, by_length
from nemotron_recipes.data.packed import PARQUET
from nemotron_recipes.data.packing import Packing, packing
from nemotron_recipes.data.pool import Task, run_here, run_parallel, usable_cpus
from nemotron_recipes.data.settings import SAMPLED, SPLITS, Settings, Source
from nemotron_recipes.data.shard_encoder import Done, Recipe, ShardEncoder
from nemotron_recipes.data.shards import Shard, cut_inputs, target_size
from nemotron_recipes.data.spool import Spool
from nemotron_recipes.data.spools import Spools
from nemotron_recipes.data.template import NO_TEMPLATE
from nemotron_recipes.data.writers import PackReader, Written, write_megatron, write_native, write_parquet
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.fsio import files_below, tree_digest
from nemotron_recipes.spec import to_json

MEGATRON_NAMES = {"train": "training", "validation": "validation", "test": "test"}
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


@dataclass(frozen=True)
class Hub:
    """A data set on the hub at one commit."""

    name: str
    revision: str | None


@dataclass(frozen=True)
class Job:
    """What to prepare. `locations`: for each source a path or address (file, folder, glob), a Hub, or None for a
    sample. `spools`: a folder that outlives this run; None: what is prepared serves this run alone."""

    method: str
    settings: Settings
    locations: tuple[Path | str | Hub | None, ...]
    tokenizer: Path  # folder
    template_source: str
    gates: Gates = field(default_factory=Gates)
    spools: Path | None = None


@dataclass
class SplitFacts:
    """What a split holds."""

    rows: int = 0
    sequences: int = 0
    packs: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0  # tokens of the longest sequence; of preference and RL rows: of prompt and answer together
    length_counts: list[int] = field(default_factory=list)  # sequences by length, in equal bins up to pack_size
    length_tokens: list[int] = field(default_factory=list)  # their tokens


@dataclass(frozen=True)
class Report:
    """The facts of a finished preparation. `sources`: name, files with their identity and counts, and the counts.
    `gates`: gate -> reason -> [rows, examples]. `gate_seconds` (CPU), `warnings` and `reused` (shards) are of this run
    alone."""

    sources: tuple[dict[str, Any], ...]
    total: Account
    splits: dict[str, SplitFacts]
    encoder: Encoder
    bad_rows: int
    gates: dict[str, dict[str, list[Any]]]
    gate_seconds: dict[str, float]
    warnings: tuple[str, ...]
    reused: int


class Progress:
    """Hears how far it is; this one says nothing."""

    def update(self, rows: int, share: float) -> None:
        """`rows` prepared in this run; `share` of all input, 0 to 1."""

    def note(self, text: str) -> None:
        """Something to know, such as waiting for another run."""


def prepare(job: Job, output: Path, progress: Progress | None = None) -> Report:
    """Write everything but metadata.json into the empty folder `output`.

    UserError: nothing to train on, a damaged input, or, with `on_bad_row: fail`, a bad row. JobFailed: the disk is
    full, or a process died. After an error `output` holds parts; the caller discards it.
    """
    return _Preparation(job, output, progress or Progress()).run()


@dataclass(frozen=True)
class PartDone:
    """What `prepare_part` did: `shards` of `of` shards, with `rows` rows; `reused`: shards that were there before."""

    shards: int
    of: int
    rows: int
    reused: int


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
        self.files: list[list[Input]] = []
        self.shards: list[Shard] = []
        self.warnings: list[str] = []
        self.gate_seconds: dict[str, float] = {}
        self.reused = 0
        self.rows = 0  # so far
        self.prefixes: dict[str, list[tuple[float, str]]] = {split: [] for split in SPLITS}  # (weight, prefix)

    def run(self) -> Report:
        shards = self.shards = self._shards()
        workers, encoder = self._encoder(shards)
        before = [_state(file) for file in self._all_files()]
        with ExitStack() as stack:
            scratch = self.output / ".spool"
            folder, keys_of = self.job.spools or scratch, self._key(encoder.encoder)
            spools = stack.enter_context(Spools(folder, keys_of, repr(shards), self.progress.note))
            identities = stack.enter_context(ThreadPoolExecutor(1)).submit(self._identities)
            keys = self._encode(encoder, shards, spools, workers)
            merged, bad_rows = self._merge(shards, [Spool(spools.folder / key) for key in keys], scratch)
            if not merged.rows["train"]:
                raise _nothing(_total(merged))
            splits = self._write(merged, [Spool(spools.folder / key) for key in keys])
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
        shards = self._shards()
        mine = shards[part::parts]
        if not mine:
            return PartDone(0, len(shards), 0, 0)
        workers, encoder = self._encoder(mine)
        with Spools(self.output, self._key(encoder.encoder), repr(mine), self.progress.note) as spools:
            self._encode(encoder, mine, spools, workers)
        return PartDone(len(mine), len(shards), self.rows, self.reused)

    def _encoder(self, shards: list[Shard]) -> tuple[int, ShardEncoder]:
        """How many processes, and the encoder of this one. Where others do the work, it needs no second engine, only
        who the tokenizer is."""
        workers = min(self.settings.workers or usable_cpus(), len(shards))
        settings = self.settings if workers <= 1 else replace(self.settings, engine="tokenizers")
        return workers, ShardEncoder(replace(self.recipe, settings=settings))

    def _shards(self) -> list[Shard]:
        """All shards in input order."""
        sources = list(zip(self.settings.sources, self.job.locations, strict=True))
        self.files = [find_files(str(where)) if isinstance(where, (Path, str)) else [] for _, where in sources]
        target = target_size(sum(file.size for files in self.files for file in files))
        shards: list[Shard] = []
        for number, (source, where) in enumerate(sources):
            limit = min((n for n in (source.rows, self.settings.sample) if n is not None), default=None)
            if isinstance(where, Hub):
                shards += _hub_shards(number, where, source, limit)
            elif where is None:
                assert limit is not None  # settings.cross_problems asks for it
                task = (source.split or "", self.job.method)
                shards.append(
                    Shard(number, 0, "sample", source.path, source.path, limit=limit, seed=source.seed, task=task)
                )
            else:
                shards += cut_inputs(number, self.files[number], limit, target)
        return shards

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

    def _merge(self, shards: list[Shard], spools: list[Spool], scratch: Path) -> tuple[Merged, int]:
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
            merger = Merger(self.job.method, self.settings, names, shards[: len(spools)], spools, bad_rows, rows)
            return merger.run(self.job.gates.corpus, scratch), bad_rows.count

    def _write(self, merged: Merged, spools: list[Spool]) -> dict[str, SplitFacts]:
        facts: dict[str, SplitFacts] = {}
        for split in SPLITS:
            if self.job.method == "sft":
                facts[split] = self._write_packs(merged, spools, split)
            elif self.job.method == "pretrain":
                facts[split] = self._write_documents(merged, spools, split)
            else:
                one = SplitFacts(sequences=merged.entries[split], tokens=merged.tokens[split])
                one.longest = merged.longest[split]
                one.length_counts, one.length_tokens = (part.tolist() for part in merged.lengths[split])
                facts[split] = one
            facts[split].rows = merged.rows[split]
        if self.job.method == "pretrain":
            write_blend(self.output, self.prefixes)
        return facts

    def _write_documents(self, merged: Merged, spools: list[Spool], split: str) -> SplitFacts:
        """One indexed data set for each source that has rows in the split: their shares are a matter of training."""
        facts = SplitFacts()
        every = merged.sequences(split)
        of = np.array([shard.source for shard in self.shards], dtype=np.int64)[every.shard]
        for number, source in enumerate(self.settings.sources):
            mine = np.flatnonzero(of == number)
            if not len(mine):
                continue
            part = Sequences(every.shard[mine], every.start[mine], every.length[mine])
            order: np.ndarray = np.arange(len(mine), dtype=np.int64)
            prefix = f"{split}/{number}-{slug(source.name or f'source-{number}')}_text_document"
            alone = Packing(order, np.arange(len(mine) + 1, dtype=np.int64), part.length.astype(np.int64))
            with closing(PackReader(spools, part, alone)) as documents:
                written = write_indexed(self.output / prefix, documents, order)
            self.prefixes[split].append((source.weight, prefix))
            facts.tokens += written.tokens
            facts.learned_tokens += written.tokens
        facts.sequences = len(every.length)
        facts.longest = int(every.length.max(initial=0))
        facts.length_counts, facts.length_tokens = by_length(every.length, self.settings.pack_size).tolist()
        return facts

    def _write_packs(self, merged: Merged, spools: list[Spool], split: str) -> SplitFacts:
        sequences = merged.sequences(split)
        packed = packing(sequences.length, self.settings.pack_size)
        # Best-fit orders packs by the length of their first sequence; a batch should be a mixture.
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(packed))
        counts, tokens = by_length(sequences.length, self.settings.pack_size).tolist()
        with closing(PackReader(spools, sequences, packed)) as packs:
            written: Written = self._writer(split)(packs, order)
        return SplitFacts(
            sequences=len(sequences.length),
            packs=len(packed),
            tokens=written.tokens,
            learned_tokens=written.learned_tokens,
            longest=int(sequences.length.max(initial=0)),
            length_counts=counts,
            length_tokens=tokens,
        )

    def _writer(self, split: str) -> Callable[[PackReader, np.ndarray], Written]:
        if self.settings.format == "native":
            return lambda packs, order: write_native(self.output / split, packs, order)
        if self.settings.format == "parquet":
            return lambda packs, order: write_parquet(self.output / split / PARQUET, packs, order)
        return lambda packs, order: write_megatron(self.output / f"{MEGATRON_NAMES[split]}.npy", packs, order)

    def _key(self, encoder: Encoder) -> list[str]:
        """What the spools of each source follow from, besides the content of a shard."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in _MERGED_LATER}
        gates = [[gate.name, gate.key] for gate in self.job.gates.rows]
        gates += [[gate.name, gate.key] for gate in self.job.gates.corpus]
        shared = [self.job.method, settings, gates, encoder.digest, encoder.template.digest, code_digest()]
        shared.append({name: version(name) for name in (*LIBRARIES, *({self.settings.engine} - {"tokenizers"}))})
        keys = []
        for source in self.settings.sources:
            weight = min(source.weight, 1.0) if self.job.method in SAMPLED else 1.0
            columns = asdict(source.columns or self.settings.columns)
            text = to_json([*shared, source.split, weight, columns])
            keys.append(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
        return keys

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
                names = dict.fromkeys(shard.task[1] for shard in self.shards if shard.source == index)
                entries = [{**facts, "split": name} for name in names]
            elif where is None:
                entries = [{"name": source.path, "seed": source.seed}]
            else:
                files = self.files[index]
                entries = [{"name": f.name, "digest": d} for f, d in zip(files, identities[index], strict=True)]
            counted = [{"identity": entry, **accounts.get(n, Account()).facts()} for n, entry in enumerate(entries)]
            total = sum(accounts.values(), Account())
            result.append({"name": source.name or f"source-{index}", "files": counted, **total.facts()})
        return result


def code_digest() -> str:
    """Identity of the code that prepares: the sources and templates of this package."""
    root = Path(__file__).parent
    return tree_digest(root, [path for path in files_below(root) if path.suffix in (".py", ".jinja")])


def _state(file: Input) -> Any:
    try:
        return file.state
    except OSError as error:
        return str(error)


def _hub_shards(number: int, hub: Hub, source: Source, limit: int | None) -> list[Shard]:
    """The data set's own files, of one split or of all one after another; at most the first `limit` rows of the source,
    and then each split is one shard."""
    from nemotron_recipes.data.readers import hub_rows, hub_splits, hub_stream

    subset = source.subset
    names = hub_splits(hub.name, subset, hub.revision) if source.hub_split == "all" else [source.hub_split]
    shards: list[Shard] = []
    for index, name in enumerate(names):
        if limit is not None and index:  # what the split before gave
            limit -= hub_rows(hub.name, subset, names[index - 1], hub.revision, limit)
            if not limit:
                break
        shard = Shard(number, index, "hub", f"hf://{hub.name}/{name}", hub.name, limit=limit,
                      task=(subset or "", name), revision=hub.revision, size=1)  # fmt: skip
        count = 1 if limit is not None else hub_stream(hub.name, subset, name, hub.revision).num_shards
        shards += [replace(shard, lo=part, hi=count) for part in range(count)] if count > 1 else [shard]
    return shards


def _total(merged: Merged) -> Account:
    return sum(merged.accounts.values(), Account())


def _nothing(total: Account) -> UserError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(total.dropped.items()))
    what = f"nothing is left to train on: {total.read} rows read, {total.written} of them for validation and test"
    fix = "data.on_bad_row=fail shows the first bad row; data.columns names fields, data.pack_size limits length"
    return UserError(Problem(what + (f"; left out: {reasons}" if reasons else ""), fix=fix))
