"""Whether a stage that has ended succeeded: exit code, torchrun's report and the record must agree. Reads only."""

from __future__ import annotations

import signal
from pathlib import Path

from nemotron_recipes.executors.torchrun import RankFailure
from nemotron_recipes.rundir import StageDir, latest_checkpoint, read_json
from nemotron_recipes.spec import Tree


def is_done(record: Tree | None, fingerprint: str) -> bool:
    """Whether the record is of this very work, and says that it succeeded."""
    return record is not None and record.get("state") == "succeeded" and record.get("fingerprint") == fingerprint


def failure_cause(
    folder: StageDir, fingerprint: str, attempt: int, code: int, failure: RankFailure | None, log: Path
) -> str:
    """Why an attempt that ended with `code` did not succeed; "" when it did.

    failure   the rank that failed first, where torchrun said so
    log       the launcher's, for whoever wants to know more
    """
    if failure:
        return f"rank {failure.rank} ended with exit code {named(failure.exit_code)}, see {log}"
    if code:
        return f"exit code {named(code)}, see {log}"
    record = read_json(folder.record)
    if record is None or record.get("attempt") != attempt:
        return f"exit code 0, but attempt {attempt} wrote no {folder.record.name}, see {log}"
    if not is_done(record, fingerprint):
        return f"exit code 0, but {folder.record} says {record.get('state')!r}"
    return ""


def what_is_kept(folder: StageDir) -> str:
    """What a stage that was ended for no fault of its own can go on from."""
    newest = latest_checkpoint(folder.checkpoints)
    return f"go on from {newest.name} with train.resume=true" if newest else "no checkpoint was saved in time"


def named(code: int) -> str:
    """`137 (SIGKILL: out of memory, perhaps)`; signals by name, other codes as they are."""
    if code <= 128 or code - 128 not in {*signal.Signals}:
        return str(code)
    name = signal.Signals(code - 128).name
    return f"{code} ({name}{': out of memory, perhaps' if name == 'SIGKILL' else ''})"
