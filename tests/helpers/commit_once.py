"""Register a version, write a record and a journal entry, save a checkpoint, give digests to one of a trainer, end a
run, each acknowledged on stdout: what strace breaks in turn."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nemotron_recipes import checkpoints, closing
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.rundir import RunDir, StageDir, write_record
from nemotron_recipes.spec import Producer
from nemotron_recipes.worker.trl.checkpoints import commit_checkpoint, staging_folder


def main(folder: Path, turn: str) -> None:
    store = Store(folder / "store")
    staged = store.stage("rows")
    (staged.content / "a.txt").write_text(turn * 100)
    made = store.commit(staged, kind="data", producer=Producer(f"f{turn}", "r", "s", "data"))
    said = [f"version {made.version}"]
    write_record(StageDir(folder / "stage"), {"attempt": int(turn)})
    said.append(f"record {turn}")
    Journal(folder).output("sft", "model", "m", int(turn))
    said.append(f"journal output m:v{turn}")
    staging = staging_folder(folder / "own") / f"checkpoint-{turn}"
    staging.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors"):
        (staging / name).write_text(turn * 100)
    commit_checkpoint(folder / "own", int(turn), keep=1)
    said.append(f"checkpoint {turn}")
    checkpoints.seal_beside(folder / "other" / "iter_0000001")
    closing.end(RunDir(folder), "finished", turn=int(turn))
    said.append(f"end {turn}")
    os.execv("/bin/echo", ["/bin/echo", "\n".join(said)])  # no write of this process's own


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
