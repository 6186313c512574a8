"""Everything of a run that carries a digest, held against it: `nemotron runs show RUN --verify`. Reads only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from nemotron_recipes import checkpoints, closing, sources
from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.rundir import RunDir, read_json, read_jsonl


def damage(view: RunView) -> list[Problem]:
    """All that is not what was written: documents, events, logs, metrics, worker files, code, checkpoints, outputs."""
    run, journal = RunDir(Path(view.path)), Journal(Path(view.path))
    documents = [run.plan, run.rendered, run.handle, journal.folder / "target.json", run.path / closing.CLOSED]
    documents += [path for name in ("record.json", "*/attempt-*.json") for path in sorted(run.path.glob(f"*/{name}"))]
    found = [problem for path in documents for problem in _problems(read_json, path)]
    events = [run.events, *sorted(run.path.glob("*/events/*.jsonl")), journal.entries_file, journal.done_file]
    found += [problem for path in events for problem in _problems(lambda file: list(read_jsonl(file, True)), path)]
    if not found:  # the rest is told by these
        found += [problem for error in closing.changed(run) for problem in error.problems]
        found += _unfit(view, run) if view.plan else ()
    return list(dict.fromkeys(found))


def unread(view: RunView) -> list[Path]:
    """Checkpoints of a run of which not everything has a digest to be held against."""
    stages = (RunDir(Path(view.path)).stage(stage.name) for stage in view.stages)
    return [folder for stage in stages for folder in checkpoints.unread(stage.checkpoints)]


def _unfit(view: RunView, run: RunDir) -> Iterator[Problem]:
    for stage in (read_json(run.rendered) or {"stages": []})["stages"]:
        for name, text in stage["files"].items():
            path = run.stage(stage["name"]).files / Path(name).name
            if not path.is_file() or path.read_bytes() != text.encode():
                yield Problem(f"{path.name} is damaged: it isn't what was planned", str(path), "bring it back")
    if other := sources.changed(run.path, view.plan["code"]["digest"]):
        yield Problem("the run's copy of the code is not what was planned", other, "bring it back from a copy")
    store = Store(Path(view.plan["store"]))
    for view_of in view.stages:
        for error in checkpoints.changed(run.stage(view_of.name).checkpoints):
            yield from error.problems
        for made in view_of.outputs.values():
            yield from _problems(lambda ref: store.verify(store.resolve(ref)), f"{made['name']}:v{made['version']}")


def _problems(read: Callable[..., object], what: Path | str) -> Iterator[Problem]:
    try:
        read(what)
    except UserError as error:
        yield from error.problems
