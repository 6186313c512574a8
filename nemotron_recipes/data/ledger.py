"""What became of every row: counts that balance (read = written + dropped), and the list of bad rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, Any

from nemotron_recipes.errors import Problem, UserError


@dataclass
class Account:
    """One file or source. `dropped` and `sequences_dropped` count by reason; sequences are what written rows became."""

    read: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sequences: int = 0  # more than rows where conversations were split or a weight repeats rows
    sequences_dropped: Counter[str] = field(default_factory=Counter)  # of rows that were written in part
    sequences_truncated: int = 0
    sequences_split: int = 0  # into pieces, which `sequences` counts

    def facts(self) -> dict[str, Any]:
        return {
            "rows_read": self.read,
            "rows_written": self.written,
            "rows_dropped": dict(sorted(self.dropped.items())),
            "sequences_written": self.sequences,
            "sequences_dropped": dict(sorted(self.sequences_dropped.items())),
            "sequences_truncated": self.sequences_truncated,
            "sequences_split": self.sequences_split,
        }

    def __add__(self, other: Account) -> Account:
        return Account(
            self.read + other.read,
            self.written + other.written,
            self.dropped + other.dropped,
            self.sequences + other.sequences,
            self.sequences_dropped + other.sequences_dropped,
            self.sequences_truncated + other.sequences_truncated,
            self.sequences_split + other.sequences_split,
        )


class BadRows:
    """Writes bad_rows.jsonl, or ends the run at the first bad row."""

    def __init__(self, handle: IO[str], fail: bool):
        self._handle = handle
        self._fail = fail
        self.count = 0

    def add(self, source: str, file: str, place: str, line: int, reason: str, detail: str) -> None:
        """A bad row at `line` of `file`, which a person finds at `place`."""
        if self._fail:
            fix = "mend the row, or set data.on_bad_row=count to leave such rows out"
            raise UserError(Problem(f"bad row ({reason}): {detail}", f"{place}, line {line}", fix))
        self.count += 1
        entry = {"source": source, "file": file, "line": line, "reason": reason, "detail": detail}
        self._handle.write(json.dumps(entry, ensure_ascii=True) + "\n")
