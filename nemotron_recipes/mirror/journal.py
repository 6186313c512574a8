"""The journal of one run: what W&B is to be told, in order, and what it has been told. Standard library only.

    <run>/mirror/target.json     where to; a W&B run id for each stage, minted once with the plan
    <run>/mirror/journal.jsonl   append-only; what happened: started, output, ended (each with its key)
    <run>/mirror/done.jsonl      append-only; keys that W&B has acknowledged, and what failed last
    <output>/mirror/pending/ID   empty; runs whose journal may hold something that W&B doesn't know

An entry's key says what it is about, so that writing or replaying one twice is the same as once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_recipes import closing
from nemotron_recipes.fsio import fsync_folder
from nemotron_recipes.rundir import append_event, read_json, read_jsonl, write_sealed
from nemotron_recipes.spec import Plan, Tree

DATA_NAME = "DataBlendsArtifact-{stage}"
MODEL_NAME = "ModelArtifact-{stage}"


@dataclass(frozen=True)
class Target:
    """Where a run is mirrored to. upload: "references" (default) or "files"; names: templates (names.py)."""

    project: str
    entity: str | None
    runs: dict[str, str]  # stage -> W&B run id
    data_name: str = DATA_NAME
    model_name: str = MODEL_NAME
    upload: str = "references"


@dataclass(frozen=True)
class Journal:
    """The mirror's files of one run."""

    run_dir: Path

    @property
    def folder(self) -> Path:
        return self.run_dir / "mirror"

    @property
    def entries_file(self) -> Path:
        return self.folder / "journal.jsonl"

    @property
    def done_file(self) -> Path:
        return self.folder / "done.jsonl"

    @property
    def idle_file(self) -> Path:
        """Touched by who tells W&B whenever all that is known so far has been told."""
        return self.folder / "idle"

    @property
    def target(self) -> Target | None:
        """None: this run isn't mirrored."""
        tree = read_json(self.folder / "target.json")
        return Target(**tree) if tree else None

    def started(self, stage: str, attempt: int, parents: Iterable[Tree]) -> None:
        """A stage has verified its inputs and begins. parents: {input, <fields of the exact Artifact>}."""
        self._append("started", f"started {stage} {attempt}", stage=stage, attempt=attempt, parents=list(parents))

    def output(self, stage: str, slot: str, name: str, version: int) -> None:
        """A stage has registered this version."""
        key = f"output {name}:v{version}"
        self._append("output", key, stage=stage, slot=slot, name=name, version=version)

    def ended(self, stage: str, attempt: int, state: str, exit_code: int, results: Tree) -> None:
        """An attempt has come to its end."""
        key = f"ended {stage} {attempt}"
        self._append("ended", key, stage=stage, attempt=attempt, state=state, exit_code=exit_code, results=results)

    def entries(self) -> list[Tree]:
        """What happened, in order, each key once."""
        lines = _lines(self.entries_file)
        return list({entry["key"]: entry for entry in reversed(lines)}.values())[::-1]

    def done(self) -> dict[str, Tree]:
        """Acknowledged keys -> what W&B said."""
        return {entry["key"]: entry for entry in _lines(self.done_file) if entry["event"] == "done"}

    def acknowledge(self, key: str, **said: Any) -> None:
        """W&B has it: durable when this returns."""
        append_event(self.done_file, "done", key=key, **said)

    def failed(self, error: str) -> None:
        """A replay ended early, and why; the journal stays as it is."""
        append_event(self.done_file, "failed", error=error)

    def last_failure(self) -> str:
        """Why the newest replay ended early; "" when it did not."""
        last = _lines(self.done_file)[-1:]
        return last[0]["error"] if last and last[0]["event"] == "failed" else ""

    def reads(self) -> set[str]:
        """Runs that made what this one reads."""
        parents = [parent for entry in self.entries() if entry["event"] == "started" for parent in entry["parents"]]
        made = {parent["producer"]["run"] for parent in parents if parent["source"] == "store" and parent["producer"]}
        return made - {self.run_dir.name}

    def missing(self) -> list[Tree]:
        """Entries that W&B has not acknowledged, in order."""
        done = self.done()
        return [entry for entry in self.entries() if entry["key"] not in done]

    def _append(self, event: str, key: str, **fields: Any) -> None:
        append_event(self.entries_file, event, key=key, **fields)


def _lines(path: Path) -> list[Tree]:
    closing.check(path)
    return list(read_jsonl(path, strict=True))


def open_journal(plan: Plan, output: Path) -> None:
    """At submission: where this run is mirrored to, and that there is something to do. Nothing when it isn't."""
    if not plan.wandb:
        return
    journal = Journal(Path(plan.run_dir))
    if journal.target is None:
        # W&B's ids may not hold / \ # ? % : and run ids don't; a later attempt finds the same ids.
        runs = {stage.name: f"{plan.id}.{stage.name}" for stage in plan.stages}
        write_sealed(journal.folder / "target.json", {"entity": None, **plan.wandb, "runs": runs})
    mark(output, plan.id)


def mark(output: Path, run: str) -> None:
    """Note that a run has something to mirror."""
    marker = output / "mirror" / "pending" / run
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    fsync_folder(marker.parent)


def pending(output: Path) -> list[str]:
    """Runs that may have something to mirror."""
    folder = output / "mirror" / "pending"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def unmark(output: Path, run: str) -> None:
    """Everything of this run has arrived."""
    (output / "mirror" / "pending" / run).unlink(missing_ok=True)
