"""What a worker module gets: its place, its verified inputs, its outputs, and word of a wish to stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.staging import Staged
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import nearest
from nemotron_recipes.pulse import Phase
from nemotron_recipes.rundir import StageDir, append_event
from nemotron_recipes.spec import Artifact, Output
from nemotron_recipes.worker.heartbeat import Heartbeat
from nemotron_recipes.worker.trainer_wandb import TrainerRun


@dataclass
class Context:
    """One rank of one attempt of a stage.

    inputs      config key -> folder, file or glob of each input that has a path (store, path, an earlier output)
    artifacts   config key -> what it is, for every input; an earlier stage's output is its exact version here
    results     numbers to record, filled by rank 0 (final loss, exact match before and after, ...)
    metadata    facts about the outputs that go into their manifests, filled by rank 0
    facts       words about how it was done that the record keeps (`trained_with`), filled by rank 0
    expendable  folders of unfinished work; on a full disk they are removed, so that the end can be recorded
    """

    rank: int
    world_size: int
    local_rank: int
    attempt: int
    dir: StageDir
    run: dict[str, str]
    store: Store
    declared: dict[str, Output]
    inputs: dict[str, Path] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    staged: dict[str, Staged] = field(default_factory=dict)
    expendable: list[Path] = field(default_factory=list)
    heartbeat: Heartbeat | None = None
    wandb: TrainerRun | None = None  # for a trainer that logs to W&B by itself; None: it shall not
    stop_signal: bool = False  # a signal asked this rank to stop
    stop_watched: bool = False  # the module asks from time to time, so it stops by itself
    stop_seen: bool = False  # the module was told to stop
    time_is_up: bool = False  # the module stopped by itself: the deadline is near

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def event(self, name: str, **fields: Any) -> None:
        """Append to this rank's events, durably. For milestones; steps go to metrics.jsonl."""
        append_event(self.dir.events(self.attempt, self.rank), name, **fields)

    def output(self, slot: str) -> Path:
        """The empty folder to write this output to; rank 0 only. It is registered after `run` returns."""
        if not self.is_main:
            raise RuntimeError(f"rank {self.rank} asked for the output '{slot}': only rank 0 writes outputs")
        if slot not in self.declared:
            raise KeyError(f"this stage has no output '{slot}'; {nearest(slot, self.declared)}")
        if slot not in self.staged:
            self.staged[slot] = self.store.stage(self.declared[slot].name)
        return self.staged[slot].content

    def at(self, phase: Phase, step: int = 0, steps: int = 0) -> None:
        """Say where this rank is, often: a module that does can be seen to hang (nemotron_recipes.pulse)."""
        if self.heartbeat is not None:
            self.heartbeat.mark(phase, step, steps)

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop (SIGTERM, Ctrl-C).

        A module that calls this finishes its step, saves and returns once it hears True; the attempt then counts as
        cancelled and registers nothing. In a module that hasn't called it yet the signal raises Cancelled at once.
        """
        self.stop_watched = True
        self.stop_seen = self.stop_seen or self.stop_signal
        return self.stop_signal
