"""Sources cut into shards: the pieces that are prepared in parallel. Where the cuts are never shows in the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemotron_recipes.data.files import KINDS, Input, kind_of, open_input
from nemotron_recipes.data.hub_rows import hub_error, hub_files, hub_rows, hub_stream
from nemotron_recipes.data.job import Hub, Job
from nemotron_recipes.data.readers import count_rows, parquet_file
from nemotron_recipes.data.settings import Source
from nemotron_recipes.data.shards import Shard
from nemotron_recipes.errors import Problem, UserError

SHARD_BYTES = 4 << 20  # of text: a few seconds of work
MOST_SHARDS = 4096  # beyond it shards grow instead
_PIECE = 1 << 20
_LINES = tuple(suffix for suffix, kind in KINDS.items() if kind in ("lines", "gzip", "zstd"))


def cut_job(job: Job, files: Sequence[Sequence[Input]]) -> list[Shard]:
    """All shards of a job in input order. `files`: of each source that lies in files."""
    jobs = zip(job.settings.sources, job.locations, strict=True)
    hubs = {number: _hub_parts(where, source) for number, (source, where) in enumerate(jobs) if isinstance(where, Hub)}
    in_files = sum(file.size for some in files for file in some)
    target = target_size(in_files + sum(part.file.size for parts in hubs.values() for part in parts if part.file))
    shards: list[Shard] = []
    for number, (source, where) in enumerate(zip(job.settings.sources, job.locations, strict=True)):
        limit = min((n for n in (source.rows, job.settings.sample) if n is not None), default=None)
        if isinstance(where, Hub):
            shards += _hub_shards(number, where, hubs[number], limit, target)
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


@dataclass(frozen=True)
class _HubPart:
    """What is read one after another of a hub data set: a file of JSON Lines, or all of a split."""

    subset: str | None
    split: str
    file: Input | None = None


def _hub_parts(hub: Hub, source: Source) -> list[_HubPart]:
    found = hub_files(hub.name, source.subset, hub.revision)
    names, wanted = list(found.splits), source.hub_split
    if wanted != "all" and wanted not in names:
        what = f"hf://{hub.name}{f', {source.subset},' if source.subset else ''} has no split '{wanted}'"
        raise UserError(Problem(what, fix=f"hub_split: {', '.join(names)}, or all: one after another"))
    parts: list[_HubPart] = []
    for split in names if wanted == "all" else [wanted]:
        places = found.splits[split]
        if all(place.endswith(_LINES) for place in places):
            try:
                parts += [_HubPart(found.subset, split, open_input(place)) for place in places]
            except OSError as error:
                raise hub_error(hub.name, error) from None
        elif split in found.whole:
            parts.append(_HubPart(found.subset, split))
        else:
            what = f"hf://{hub.name}: {source.subset} is a part of the split '{split}', and not in JSON Lines"
            raise UserError(Problem(what, fix=f"subset: null, hub_split: {split}"))
    return parts


def _hub_shards(number: int, hub: Hub, parts: Sequence[_HubPart], limit: int | None, target: int) -> list[Shard]:
    """At most the first `limit` rows of the source."""
    shards: list[Shard] = []
    left = limit
    for index, part in enumerate(parts):
        if left is not None and left <= 0:
            break
        where = Shard(
            number, index, "hub", f"hf://{hub.name}/{part.split}", hub.name, task=(part.subset or "", part.split),
            revision=hub.revision, limit=left, size=1,
        )  # fmt: skip
        if part.file is not None:
            place = part.file.place
            where = replace(where, kind=kind_of(place), name=f"{where.name}/{part.file.name}", place=place, limit=None)
            cut, found = _cut_file(where, part.file, left, target)
            shards += cut
        elif left is None:
            found, count = 0, hub_stream(hub.name, part.subset, part.split, hub.revision).num_shards
            shards += [replace(where, lo=one, hi=count) for one in range(count)] if count > 1 else [where]
        else:
            shards.append(where)
            last = index == len(parts) - 1
            found = 0 if last else hub_rows(hub.name, part.subset, part.split, hub.revision, left)
        left = None if left is None else left - found
    return shards
