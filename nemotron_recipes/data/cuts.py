"""Sources cut into shards: the pieces that are prepared in parallel. Where the cuts are never shows in the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nemotron_recipes.data.files import Input, kind_of
from nemotron_recipes.data.hub_rows import hub_rows, hub_splits, hub_stream
from nemotron_recipes.data.job import Hub, Job
from nemotron_recipes.data.readers import count_rows, parquet_file
from nemotron_recipes.data.settings import Source
from nemotron_recipes.data.shards import Shard
from nemotron_recipes.errors import Problem, UserError

SHARD_BYTES = 4 << 20  # of text: a few seconds of work
MOST_SHARDS = 4096  # beyond it shards grow instead
_PIECE = 1 << 20


def cut_job(job: Job, files: Sequence[Sequence[Input]]) -> list[Shard]:
    """All shards of a job in input order. `files`: of each source that lies in files."""
    target = target_size(sum(file.size for some in files for file in some))
    shards: list[Shard] = []
    for number, (source, where) in enumerate(zip(job.settings.sources, job.locations, strict=True)):
        limit = min((n for n in (source.rows, job.settings.sample) if n is not None), default=None)
        if isinstance(where, Hub):
            shards += _hub_shards(number, where, source, limit)
        elif where is None:
            assert limit is not None  # settings.cross_problems asks for it
            task = (source.split or "", job.method)
            shards.append(
                Shard(number, 0, "sample", source.path, source.path, limit=limit, seed=source.seed, task=task)
            )
        else:
            shards += cut_inputs(number, files[number], limit, target)
    return shards


def cut_inputs(source: int, files: Sequence[Input], rows: int | None, target: int) -> list[Shard]:
    """The shards of a source's files in order; at most the first `rows` rows of the source."""
    shards: list[Shard] = []
    left = rows
    for index, file in enumerate(files):
        if left is not None and left <= 0:
            break
        shard = Shard(source, index, kind_of(file.place), file.name, file.place)
        try:
            cut, found = _cut_file(shard, file, left, target)
        except OSError as error:
            raise UserError(Problem(f"{file.place} can't be read: {error}")) from None
        shards += cut
        left = None if left is None else left - found
    return shards


def target_size(total: int) -> int:
    """Bytes per shard for inputs of `total` bytes: a power of two times SHARD_BYTES, so that growing data keep most
    of their cuts, and with them what was prepared before."""
    target = SHARD_BYTES
    while total > target * MOST_SHARDS:
        target *= 2
    return target


def _cut_file(shard: Shard, file: Input, rows: int | None, target: int) -> tuple[list[Shard], int]:
    """The shards of one file, and how many rows they hold where `rows` limits them (else 0)."""
    if shard.kind == "lines":
        end, found = (file.size, 0) if rows is None else _end_of_rows(file, rows)
        return [
            replace(shard, lo=lo, hi=min(lo + target, end), size=min(target, end - lo)) for lo in range(0, end, target)
        ], found
    if shard.kind == "parquet":
        return _row_groups(shard, file, rows, target)
    return [replace(shard, limit=rows, size=file.size)], 0 if rows is None else count_rows(shard, rows)


def _end_of_rows(file: Input, rows: int) -> tuple[int, int]:
    """(bytes, rows): where the first `rows` rows end."""
    found = position = 0
    with file.open() as handle:
        while found < rows and (line := handle.readline(_PIECE)):
            position += len(line)
            content = line.strip() != b""
            while not line.endswith(b"\n") and (line := handle.readline(_PIECE)):
                position += len(line)
                content = content or line.strip() != b""
            found += content
    return position, found


def _row_groups(shard: Shard, file: Input, rows: int | None, target: int) -> tuple[list[Shard], int]:
    shards: list[Shard] = []
    metadata = parquet_file(file.place).metadata
    lo = size = held = total = 0
    for group in range(metadata.num_row_groups):
        facts = metadata.row_group(group)
        left = None if rows is None else rows - total - held
        if left is not None and left <= 0:
            break
        size += facts.total_byte_size
        held += facts.num_rows
        if size >= target or group == metadata.num_row_groups - 1 or (left is not None and facts.num_rows >= left):
            limit = None if rows is None else min(held, rows - total)
            shards.append(replace(shard, lo=lo, hi=group + 1, limit=limit, size=size))
            total += held
            lo, size, held = group + 1, 0, 0
    return shards, min(total, rows) if rows is not None else 0


def _hub_shards(number: int, hub: Hub, source: Source, limit: int | None) -> list[Shard]:
    """The data set's own files, of one split or of all one after another; at most the first `limit` rows of the source,
    and then each split is one shard."""
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
