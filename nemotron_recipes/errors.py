"""The one error tree. Everything a user can cause ends here, with an exit code and without a traceback.

Exit codes: 0 done; 1 the job failed; 2 the request is wrong; 75 saved, but not done; 130 stopped.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

SHOWN = 12  # valid names listed where none is near


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what it is, where it came from, what to do about it.

    refuses   False: it is told before a run starts, and keeps nothing from starting
    """

    what: str
    where: str = ""
    fix: str = ""
    refuses: bool = True

    def __str__(self) -> str:
        text = self.what
        if self.where:
            text += f"\n    from: {self.where}"
        if self.fix:
            text += f"\n    fix:  {self.fix}"
        return text


class NemotronError(Exception):
    """Root of the tree; `exit_code` is what the process ends with."""

    exit_code = 1


class UserError(NemotronError):
    """The request is wrong. Carries every problem found, never only the first."""

    exit_code = 2

    def __init__(self, *problems: Problem | str):
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class JobFailed(NemotronError):
    """A job ran and did not succeed: the message names the rank, its last error lines and the log."""

    exit_code = 1


class Cancelled(NemotronError):
    """The user or somebody else stopped the run; 130 is the shell's convention for Ctrl-C."""

    exit_code = 130


class Unfinished(NemotronError):
    """The time is nearly up: what was reached is saved, and another attempt can go on from there.

    75 is EX_TEMPFAIL of sysexits.h; executors take it as the wish to be started again.
    """

    exit_code = 75


def nearest(word: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of what is valid, or an empty string when nothing is."""
    options = sorted(set(valid))
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if not close and word:  # a word cut short
        close = [option for option in options if option.startswith(word)][:1]
    if close:
        return f"did you mean '{close[0]}'?"
    if not options:
        return ""
    more = f", ... ({len(options)} in all)" if len(options) > SHOWN else ""
    return f"valid: {', '.join(options[:SHOWN])}{more}"


def printable(text: str) -> str:
    """Text that is safe on a terminal: control and other unprintable characters as escapes; line breaks stay."""
    if text.isprintable():  # nearly every line of a log, and 50 times as fast
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)
