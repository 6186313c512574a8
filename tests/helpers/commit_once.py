"""Register a version, write a record and a journal entry, each acknowledged on stdout: what strace breaks in turn."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.rundir import StageDir, write_record
from nemotron_recipes.spec import Producer


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
    os.execv("/bin/echo", ["/bin/echo", "\n".join(said)])  # no write of this process's own


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
