"""What a journal holds, told to W&B: runs with their curves, artifacts with their aliases, who used and made them.

An entry is acknowledged only when W&B has it, and telling W&B twice changes nothing. A W&B run is entered by its own
id; metrics go by their training step, and W&B itself says which step it has seen last, whether they stand in
metrics.jsonl or in a trainer's own files; an artifact is looked for by its own alias before it is made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemotron_recipes import closing
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import UserError
from nemotron_recipes.mirror.journal import Journal, Target
from nemotron_recipes.mirror.media import Media
from nemotron_recipes.mirror.names import Named, named
from nemotron_recipes.mirror.offline import OfflineFile, offline_files
from nemotron_recipes.rundir import RunDir, read_json
from nemotron_recipes.spec import Artifact, Tree

FOLLOW_SECONDS = 5.0  # between looks at a run that is followed
QUIET_SECONDS = 30.0  # without a change, after which a trainer's file without an end gets none any more
SETTLE_SECONDS = 20.0  # for W&B to have worked in what it was sent
MOST_FILES = 1_000_000  # of a folder that is mirrored as references


class NotTold(Exception):
    """W&B does not have it: the text says why."""


class Teller:
    """The W&B side of one run. `wandb` is the imported SDK."""

    def __init__(self, wandb: Any, run_dir: Path, target: Target):
        self.wandb = wandb
        self.run = RunDir(run_dir)
        self.journal = Journal(run_dir)
        self.target = target
        self.plan: Tree = read_json(self.run.plan) or {}
        self.store = Store(Path(self.plan["store"]))
        self.api = wandb.Api(timeout=30)
        self.opened: dict[str, Any] = {}  # stage -> W&B run in progress
        self.sent: dict[str, int] = {}  # stage -> last step that was handed to the SDK
        self.files: dict[Path, OfflineFile] = {}  # a trainer's own
        self.seen: dict[Path, tuple[int, float]] = {}  # ... its size, and since when
        self.configured: dict[str, Tree] = {}  # stage -> what W&B was told of its trainer's configuration
        self.left_out: dict[str, set[str]] = {}  # stage -> keys that a trainer logged and W&B is not told
        self.telling = ""  # the key of the entry that W&B is being told

    def tell(self, goes_on: Callable[[], bool]) -> None:
        """Everything that is missing, and what comes while the worker `goes_on`."""
        while True:
            alive = goes_on()
            for entry in self.journal.missing():
                if self._more_comes(entry, alive):
                    break
                self.telling = entry["key"]
                self._tell_entry(entry)
            self.telling = ""
            for stage in self.opened:
                self._tell_metrics(stage, whole=False)
            if not alive and not self.journal.missing():
                break
            self.journal.idle_file.touch()  # it waits for the run, not for W&B
            time.sleep(FOLLOW_SECONDS)
        self._tell_aliases()
        for stage in list(self.opened):
            self._close(stage, exit_code=None)

    def _tell_entry(self, entry: Tree) -> None:
        stage = entry["stage"]
        if entry["event"] == "started":
            self._tell_inputs(stage, entry["parents"])
            self.journal.acknowledge(entry["key"])
        elif entry["event"] == "output":
            version = self._tell_output(stage, entry)
            self.journal.acknowledge(entry["key"], wandb=version)
        else:
            run = self._open(stage)
            self._tell_metrics(stage, whole=True)
            run.summary.update({**entry["results"], "state": entry["state"]})
            self._close(stage, entry["exit_code"])
            left_out = sorted(self.left_out.pop(stage, ()))
            self.journal.acknowledge(entry["key"], **({"left_out": left_out} if left_out else {}))

    def _tell_inputs(self, stage: str, parents: list[Tree]) -> None:
        run = self._open(stage)
        for parent in parents:
            artifact = Artifact.from_tree({key: value for key, value in parent.items() if key != "input"})
            if artifact.source == "store" and (made_from := _pulled_from(self.store, artifact)):
                run.use_artifact(made_from)
                continue
            name = named(self.target, artifact)
            if self._exists(run, name):
                run.use_artifact(f"{run.entity}/{run.project}/{name.path}")
            else:
                self._wait(run.use_artifact(self._reference(name, artifact), aliases=[name.alias]))

    def _tell_output(self, stage: str, entry: Tree) -> str:
        run = self._open(stage)
        artifact = self.store.resolve(f"{entry['name']}:v{entry['version']}")
        name = named(self.target, artifact, stage)
        if not self._exists(run, name):
            self._wait(run.log_artifact(self._reference(name, artifact), aliases=[name.alias]))
        return f"{run.entity}/{run.project}/{name.path}"

    def _tell_metrics(self, stage: str, whole: bool) -> None:
        """Rows that W&B has not seen; the newest step only when it is `whole`, since a row may still join it.

        A stage whose trainer logs to W&B by itself is told that, and not metrics.jsonl, which holds the same figures
        under other names. Of a step that attempts repeat the newest counts; what W&B has stays.
        """
        if stage not in self.opened:
            return
        run = self.opened[stage]
        steps: dict[int, Tree] = {}
        if files := self._trainers(stage):
            for file in files:
                logged = file.read(ended=whole)
                self._tell_config(run, stage, logged.config)
                steps.update(logged.rows)
        else:
            for row in closing.metrics(self.run.stage(stage)):
                told = {k: math.nan if v is None else v for k, v in row.items() if k != "time"}  # null: no number
                steps.setdefault(row["step"], {}).update(told)
        last = max(steps, default=0)
        for step in sorted(step for step in steps if step > self.sent[stage] and (whole or step < last)):
            if row := self._sendable(stage, steps[step]):
                run.log(row, step=step, commit=True)
                self.sent[stage] = step

    def _sendable(self, stage: str, row: Tree) -> Tree:
        """A row as the SDK takes it: tables, pictures and the like made anew from the files that they lie in."""
        told = {}
        for key, value in row.items():
            try:
                again = value.again(self.wandb) if isinstance(value, Media) else value
            except (OSError, ValueError, KeyError, TypeError):  # its file is gone or damaged
                again = None
            if again is None:
                self.left_out.setdefault(stage, set()).add(key)
            else:
                told[key] = again
        return told

    def _tell_config(self, run: Any, stage: str, config: Tree) -> None:
        """What the trainer says of its configuration; our own words stand."""
        ours = {"nemotron", *self._planned(stage)["config"]}
        told = {key: value for key, value in config.items() if key not in ours}
        if self.configured.get(stage) != told:
            run.config.update(told, allow_val_change=True)
            self.configured[stage] = told

    def _trainers(self, stage: str) -> list[OfflineFile]:
        found = offline_files(self.run.stage(stage), self.target.runs[stage])
        return [self.files.setdefault(path, OfflineFile(path)) for path in found]

    def _more_comes(self, entry: Tree, alive: bool) -> bool:
        """Whether a trainer is still writing what belongs to this end: the worker notes its end while it lives."""
        stage = entry["stage"]
        files = self._trainers(stage)
        newest = [e for e in self.journal.entries() if e["stage"] == stage and e["event"] in ("started", "ended")][-1]
        if entry["event"] != "ended" or not files or newest["key"] != entry["key"]:
            return False
        path = files[-1].path
        if files[-1].read(ended=False).whole:
            return False
        size, since = self.seen.get(path, (-1, 0.0))
        if size != (now := path.stat().st_size):
            self.seen[path] = size, since = now, time.monotonic()
        return alive or time.monotonic() - since < QUIET_SECONDS

    def _tell_aliases(self) -> None:
        """The user's aliases, as they stand in the store now."""
        done = self.journal.done()
        for entry in self.journal.entries():
            if entry["event"] != "output" or entry["key"] not in done:
                continue
            label = f"{entry['name']}:v{entry['version']}"
            wanted = sorted(
                a for a, version in self.store.aliases(entry["name"]).items() if version == entry["version"]
            )
            told = done.get(f"aliases {label}", {}).get("aliases", [])
            if wanted == told:
                continue
            found = self.api.artifact(done[entry["key"]]["wandb"])
            kept = [alias for alias in found.aliases if alias not in told]
            found.aliases = [*kept, *(alias for alias in wanted if alias not in kept)]
            found.save()
            self.journal.acknowledge(f"aliases {label}", aliases=wanted)

    def _open(self, stage: str) -> Any:
        if stage not in self.opened:
            planned = self._planned(stage)
            about = {"run": self.plan["id"], "fingerprint": planned["fingerprint"], "code": self.plan["code"]["digest"]}
            about |= {key: self.plan[key] for key in ("sweep", "rerun_of") if self.plan.get(key)}
            self.opened[stage] = self.wandb.init(
                entity=self.target.entity,
                project=self.target.project,
                id=self.target.runs[stage],
                resume="allow",
                name=self.target.runs[stage],
                group=self.plan.get("sweep") or self.plan["id"],
                job_type=stage,
                config={**planned["config"], "nemotron": {**about, "folder": str(self.run.path)}},
                reinit="create_new",
                settings=self.wandb.Settings(**_settings()),
            )
            self.sent[stage] = self.opened[stage].starting_step - 1
        return self.opened[stage]

    def _planned(self, stage: str) -> Tree:
        return next(s for s in self.plan["stages"] if s["name"] == stage)

    def _close(self, stage: str, exit_code: int | None) -> None:
        """Until W&B has it all: the SDK's `finish` also returns when W&B refused what it was sent."""
        run = self.opened.pop(stage)
        run.finish(exit_code=exit_code) if exit_code is not None else run.finish()
        if self.sent[stage] > 0:
            told = self.api.run(f"{run.entity}/{run.project}/{run.id}")
            seen, until = told.lastHistoryStep, time.monotonic() + SETTLE_SECONDS
            while seen < self.sent[stage] and time.monotonic() < until:
                time.sleep(0.5)
                seen = told.lastHistoryStep
            if seen < self.sent[stage]:
                raise NotTold(f"W&B has {stage} up to step {seen} of {self.sent[stage]}")

    def _exists(self, run: Any, name: Named) -> bool:
        return bool(self.api.artifact_exists(f"{run.entity}/{run.project}/{name.path}"))

    def _reference(self, name: Named, artifact: Artifact) -> Any:
        """An artifact for W&B: a reference to where the content lies, or the files where that was asked for."""
        manifest = self.store.describe(artifact) if artifact.source == "store" else {}
        facts: Tree = {key: manifest[key] for key in ("size", "files", "metadata", "results") if key in manifest}
        facts |= {"digest": artifact.digest, "uri": artifact.uri, "label": artifact.label}
        made = self.wandb.Artifact(name.collection, name.type, metadata=facts)
        content = Path(artifact.uri)
        if artifact.source == "store" and self.target.upload == "files":
            made.add_dir(str(content), policy="immutable", skip_cache=True)  # as they lie: no copy of a model in /tmp
        elif artifact.source == "store" and content.is_dir():
            # The prefix keeps two versions with files of the same names and sizes apart; digests are in the metadata.
            made.add_reference(content.as_uri(), name=name.alias, checksum=False, max_objects=MOST_FILES)
        else:
            uri = content.as_uri() if artifact.source == "store" else name.uri
            made.add_reference(f"nemotron+{uri}" if uri.startswith("file:") else uri, name=name.alias, checksum=False)
        return made

    def _wait(self, artifact: Any) -> None:
        try:
            artifact.wait()
        except ValueError as error:  # what the SDK makes of a refusal
            raise NotTold(f"W&B did not take {artifact.name}: {error}") from None


def _settings() -> Tree:
    """Nothing but what is told: no code, console, git, hardware figures or package lists by the SDK's own hand."""
    return {
        "silent": True,
        "console": "off",
        "disable_git": True,
        "disable_code": True,
        "x_disable_stats": True,
        "x_disable_meta": True,
        "x_save_requirements": False,
        "init_timeout": 60,
    }


def _pulled_from(store: Store, artifact: Artifact) -> str | None:
    """The W&B name of a version that was itself taken from W&B."""
    try:
        name = store.describe(artifact)["metadata"].get("wandb")
    except UserError:
        return None
    return str(name) if name else None
