"""One run's journal, told to W&B by the real SDK.

    python -m nemotron_recipes.mirror.replay RUN [--wait] [--follow PID]
    python -m nemotron_recipes.mirror.replay       only ask whether W&B answers

Exactly once, in order, after any interruption: an entry is acknowledged in done.jsonl only when W&B has it, and telling
W&B twice changes nothing. A W&B run is entered by its own id; metrics go by their training step, and W&B itself says
which step it has seen last, whether they stand in metrics.jsonl or in a trainer's own files; an artifact is looked for
by its own alias before it is made.

Whoever starts this process watches it (sync.py): the SDK may wait for ever. Exit codes: 0 all told, 1 not all,
3 another process is at it (with --wait: its end is awaited).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nemotron_recipes import closing
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import UserError
from nemotron_recipes.mirror.journal import Journal, Target
from nemotron_recipes.mirror.names import Named, named
from nemotron_recipes.mirror.offline import Logged, offline_files, read_offline
from nemotron_recipes.mirror.sync import BUSY
from nemotron_recipes.redact import scrub, secret_values
from nemotron_recipes.rundir import RunDir, read_json
from nemotron_recipes.spec import Artifact, Tree

FOLLOW_SECONDS = 5.0  # between looks at a run that is followed
QUIET_SECONDS = 30.0  # without a change, after which a trainer's file without an end gets none any more
SETTLE_SECONDS = 20.0  # for W&B to have worked in what it was sent
MOST_FILES = 1_000_000  # of a folder that is mirrored as references


class NotTold(Exception):
    """W&B does not have it: the text says why."""


class Replay:
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
        self.seen: dict[Path, tuple[int, float]] = {}  # a trainer's file -> its size, and since when
        self.telling = ""  # the key of the entry that W&B is being told

    def tell(self, follow: int | None = None) -> None:
        """Everything that is missing; with `follow` also what comes while that process lives."""
        while True:
            alive = follow is not None and _alive(follow)
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
            self.journal.acknowledge(entry["key"])

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

        A stage whose trainer logs to W&B by itself is told that when an attempt has ended, and not metrics.jsonl, which
        holds the same figures under other names. Of a step that attempts repeat the newest counts; what W&B has stays.
        """
        if stage not in self.opened:
            return
        run = self.opened[stage]
        steps: dict[int, Tree] = {}
        if files := self._trainers(stage):
            if not whole:
                return
            for logged in map(read_offline, files):
                self._tell_config(run, stage, logged)
                steps.update(logged.rows)
        else:
            for row in closing.metrics(self.run.stage(stage)):
                told = {key: value for key, value in row.items() if value is not None and key != "time"}
                steps.setdefault(row["step"], {}).update(told)
        last = max(steps, default=0)
        for step, row in sorted(steps.items()):
            if step > self.sent[stage] and (whole or step < last):
                run.log(row, step=step)
                self.sent[stage] = step

    def _tell_config(self, run: Any, stage: str, logged: Logged) -> None:
        """What the trainer says of its configuration; our own words stand."""
        ours = {"nemotron", *self._planned(stage)["config"]}
        run.config.update({k: v for k, v in logged.config.items() if k not in ours}, allow_val_change=True)

    def _trainers(self, stage: str) -> list[Path]:
        return offline_files(self.run.stage(stage), self.target.runs[stage])

    def _more_comes(self, entry: Tree, alive: bool) -> bool:
        """Whether a trainer is still writing what belongs to this end: the worker notes its end while it lives."""
        stage = entry["stage"]
        files = self._trainers(stage)
        newest = [e for e in self.journal.entries() if e["stage"] == stage and e["event"] in ("started", "ended")][-1]
        if entry["event"] != "ended" or not files or newest["key"] != entry["key"] or read_offline(files[-1]).whole:
            return False
        size, since = self.seen.get(files[-1], (-1, 0.0))
        if size != (now := files[-1].stat().st_size):
            self.seen[files[-1]] = size, since = now, time.monotonic()
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
            self.opened[stage] = self.wandb.init(
                entity=self.target.entity,
                project=self.target.project,
                id=self.target.runs[stage],
                resume="allow",
                name=self.target.runs[stage],
                group=self.plan["id"],
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
            made.add_dir(str(content))
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nemotron_recipes.mirror.replay")
    parser.add_argument("run", type=Path, nargs="?", help="without it: only ask whether W&B answers")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--follow", type=int, metavar="PID", default=None)
    options = parser.parse_args(argv)
    if options.run is None:
        with tempfile.TemporaryDirectory(prefix="nemotron-mirror-") as scratch:
            return _ask(scratch)
    journal = Journal(options.run)
    with _alone(journal, options.wait) as free:
        if not free:
            return BUSY
        with tempfile.TemporaryDirectory(prefix="nemotron-mirror-") as scratch:
            return _replay(journal, options.follow, scratch)


def _replay(journal: Journal, follow: int | None, scratch: str) -> int:
    target = journal.target
    if target is None:
        return 0
    _prepare_environment(scratch)
    hidden = secret_values(os.environ)
    try:
        import wandb
        from wandb.errors import Error as WandbError
    except ModuleNotFoundError:
        journal.failed("the package 'wandb' isn't installed: pip install 'nemotron-recipes[wandb]'")
        return 1
    telling = ""
    try:
        replay = Replay(wandb, journal.run_dir, target)
        try:
            replay.tell(follow)
        finally:
            telling = replay.telling
    except (WandbError, NotTold, UserError, OSError, ValueError, TimeoutError) as error:
        said = scrub(str(error).strip() or type(error).__name__, hidden).splitlines()[0]
        text = f"{telling}: {said}" if telling else said
        journal.failed(text)
        print(f"{journal.run_dir.name}: {text}", file=sys.stderr)
        return 1
    return 0


def _ask(scratch: str) -> int:
    """0: W&B answers, and takes the key."""
    _prepare_environment(scratch)
    try:
        import wandb
        from wandb.errors import Error as WandbError
    except ModuleNotFoundError:
        return 1
    try:
        print(wandb.Api(timeout=30).default_entity)  # a question that every key may ask
        return 0
    except (WandbError, OSError, ValueError, TimeoutError):
        return 1


class _alone:
    """Held while a run is told; False where another process of this machine holds it and `wait` is unset."""

    def __init__(self, journal: Journal, wait: bool):
        self.path = journal.folder / "lock"
        self.mode = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB

    def __enter__(self) -> bool:
        self.handle = open(self.path, "a")
        try:
            fcntl.flock(self.handle, self.mode)
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        self.handle.close()


def _prepare_environment(scratch: str) -> None:
    """The SDK's own files go to a folder that vanishes; settings of a trainer's own W&B run must not reach in here."""
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_PROJECT", "WANDB_ENTITY"):
        os.environ.pop(name, None)
    places = dict.fromkeys(("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"), scratch)
    os.environ.update(places, WANDB_ERROR_REPORTING="false", WANDB_SILENT="true")


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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    sys.exit(main())
