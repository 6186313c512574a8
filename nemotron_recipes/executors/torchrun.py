"""torchrun's command line, and what its log says of a rank that failed.

torchrun itself ends with 1 whatever became of its workers; only its closing report (ChildFailedError) knows more.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_REPORT_BYTES = 64 * 1024  # of the log's end: the report comes last, with five lines per rank
_ROOT_CAUSE = re.compile(
    r"^Root Cause \(first observed failure\):$.*?"
    r"^\s*rank\s*: (?P<rank>\d+) \(local_rank: \d+\)$.*?"
    r"^\s*exitcode\s*: (?P<code>-?\d+) \(pid: \d+\)",
    re.MULTILINE | re.DOTALL,
)


class RankFailure(NamedTuple):
    """The rank that failed first, and its exit code (128+n for signal n)."""

    rank: int
    exit_code: int


def command(
    module: str, args: Sequence[str], nproc: int, log_dir: Path, nodes: int = 1, python: str = sys.executable
) -> tuple[str, ...]:
    """argv that runs `module` in `nproc` processes on each of `nodes` machines; the same for the same input.

    With several nodes the argv is one and the same on each; PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT in the
    environment, which torchrun reads as its options, tell them apart and where to meet.
    """
    if nodes == 1:
        meeting: tuple[str, ...] = (
            "--standalone",
            "--local-addr=127.0.0.1",
        )  # a free port, and no look-up of this machine's name
    else:
        meeting = ("--rdzv-backend=static",)
    return (
        *(python, "-m", "torch.distributed.run", *meeting),
        *(f"--nnodes={nodes}", f"--nproc-per-node={nproc}", "--max-restarts=0"),
        f"--log-dir={log_dir}",  # else it litters the temporary folder
        *("-m", module),
        # Each of these goes through string.Template (for ${local_rank}), from which `$$` comes out as `$`.
        *(argument.replace("$", "$$") for argument in args),
    )


def first_failure(log: Path) -> RankFailure | None:
    """What torchrun's closing report names as the root cause; None when the log holds no report."""
    try:
        with open(log, "rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - _REPORT_BYTES))
            text = handle.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    found = list(_ROOT_CAUSE.finditer(text))
    if not found:
        return None
    code = int(found[-1]["code"])
    return RankFailure(int(found[-1]["rank"]), code if code >= 0 else 128 - code)
