"""Start the replay of journals in processes of their own, and end those that get stuck. wandb is not imported here.

python -m nemotron_recipes.mirror.sync RUN PID       beside a worker: while that process lives, and to the end of it
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nemotron_recipes.mirror.journal import Journal, pending, unmark
from nemotron_recipes.mirror.scratch import sweep
from nemotron_recipes.rundir import ATTEMPT_ENV, DEADLINE_ENV, RUN_ID_ENV, Damaged, RunDir

STALL_SECONDS = 120.0  # without a new acknowledgement or traffic: the SDK itself would wait for days
LEAST_TRAFFIC = 8192  # bytes a second, on average: an SDK that only asks again and again writes less
PAUSE_SECONDS = 60.0  # between two attempts in the background
WAIT_SECONDS = 60.0  # for another process that is at it; less than what counts as a stall
BUSY = 3
MODULE = "nemotron_recipes.mirror.replay"
FOLLOWER = "nemotron_recipes.mirror.sync"


@dataclass(frozen=True)
class Outcome:
    """What became of one run's journal: how many entries were told now, how many are left, and why."""

    run: str
    told: int
    left: int
    why: str = ""


def replay(run_dir: Path, stall: float = STALL_SECONDS, wait: bool = True, follow: int | None = None) -> Outcome:
    """Tell W&B what is missing of one run. Returns when all is told, or nothing more arrives: neither has anything been
    acknowledged for `stall` seconds nor, on Linux, have this process and the SDK's written LEAST_TRAFFIC.

    wait: for another process that is at it, such as the one beside a worker; it ends soon after the run.
    follow: also tell what comes while that process lives.
    """
    journal = Journal(run_dir)
    before = len(journal.done())
    arguments = [str(run_dir), *(["--wait", str(min(WAIT_SECONDS, stall / 2))] if wait else [])]
    with open(journal.folder / "replay.log", "ab") as log:
        process = _start([*arguments, *(["--follow", str(follow)] if follow else [])], log)
    stuck = False
    try:
        stuck = not _wait(process, journal, stall)
    finally:
        _end_group(process)
    missing = journal.missing()
    told = len(journal.done()) - before
    why = ""
    if stuck:
        at = f"{missing[0]['key']}: " if missing else ""
        why = f"{at}W&B did not answer for {stall:.0f} s"
    elif process.returncode == BUSY:
        why = "another process is telling W&B of it" if wait and missing else ""
    elif process.returncode:
        log_file = journal.folder / "replay.log"
        why = journal.last_failure() or f"its process ended with exit code {process.returncode}; see {log_file}"
    return Outcome(run_dir.name, told, len(missing), why)


def replay_all(output: Path, active: Collection[str] = (), stall: float = STALL_SECONDS) -> list[Outcome]:
    """Every run that may have something to mirror, oldest first.

    A run that W&B refuses stays in its journal, and so do those that read what it made, since W&B is told in order;
    others go on. Where W&B answers nobody, the rest is not tried.

    active: runs that go on; the process beside such a worker is not waited for.
    """
    found, outcomes = _mirrored(output)
    blocked = {outcome.run for outcome in outcomes}
    reachable = True
    for run in found:
        try:
            journal = Journal(run)
            waits = sorted(journal.reads() & blocked)
            if waits or not reachable:
                why = f"waits for {', '.join(waits)}, which made what it reads" if waits else "not tried"
                outcome = Outcome(run.name, 0, len(journal.missing()), why)
            else:
                outcome = replay(run, stall, wait=run.name not in active)
                reachable = not outcome.why or answers(stall)
        except Damaged as error:
            outcome = Outcome(run.name, 0, 0, str(error))
        outcomes.append(outcome)
        if outcome.why or outcome.left:
            blocked.add(run.name)
    return outcomes


def answers(seconds: float = STALL_SECONDS) -> bool:
    """Whether W&B answers at all, with the key that is there."""
    process = _start([], subprocess.DEVNULL)
    try:
        return process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        _end_group(process)


def _mirrored(output: Path) -> tuple[list[Path], list[Outcome]]:
    """(runs to tell W&B of, oldest first; those whose own files are damaged). Forgets what isn't mirrored, or gone."""
    found, damaged = [], []
    for run in (output / "runs" / name for name in pending(output)):
        try:
            plan = RunDir(run).plan
            if Journal(run).target is None or not plan.exists():
                unmark(output, run.name)
            else:
                found.append((plan.stat().st_mtime, run))
        except Damaged as error:
            damaged.append(Outcome(run.name, 0, 0, str(error)))
    return [run for _, run in sorted(found)], damaged


def in_background(output: Path, environ: Mapping[str, str] = os.environ) -> bool:
    """Replay what is pending in a process that nobody waits for; whether one was started."""
    if not pending(output) or not can_reach(environ):
        return False
    mark = output / "mirror" / "attempted"
    try:
        if time.time() - mark.stat().st_mtime < PAUSE_SECONDS:
            return False
    except FileNotFoundError:
        pass
    mark.touch()
    _detached(["-m", "nemotron_recipes", "artifacts", "sync", "--output", str(output)], environ)
    return True


def follow(run_dir: Path, pid: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Beside a worker: tell W&B what comes while process `pid` lives. Nobody waits for it, nothing depends on it."""
    if Journal(run_dir).target is None or not can_reach(environ):
        return False
    _detached(["-m", FOLLOWER, str(run_dir), str(pid)], environ)
    return True


def main(argv: list[str] | None = None) -> int:
    """Beside a worker. W&B that fails or hangs is tried again while the worker lives; later `artifacts sync` does."""
    run_dir, pid = sys.argv[1:] if argv is None else argv
    while (outcome := replay(Path(run_dir), follow=int(pid))).why and is_alive(int(pid)):
        time.sleep(PAUSE_SECONDS)
    return 1 if outcome.why else 0


def is_alive(pid: int | None) -> bool:
    """Whether a process of this machine lives; None: there is none to look for."""
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def can_reach(environ: Mapping[str, str]) -> bool:
    """Whether an attempt makes sense: the SDK is here, it has a key, and nobody asked it to stay offline."""
    if importlib.util.find_spec("wandb") is None or environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    return bool(environ.get("WANDB_API_KEY")) or any(
        os.path.exists(os.path.expanduser(path)) for path in (environ.get("NETRC") or "~/.netrc", "~/_netrc")
    )


def _start(arguments: list[str], log: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """The replaying process, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, *arguments, "--watcher", str(os.getpid())],
        env=_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _detached(arguments: list[str], environ: Mapping[str, str]) -> None:
    subprocess.Popen(
        [sys.executable, *arguments],
        env=_environment(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what makes a process part of a run: who looks for the run's processes must not find this one."""
    own = (RUN_ID_ENV, ATTEMPT_ENV, DEADLINE_ENV, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {name: value for name, value in environ.items() if name not in own}


def _wait(process: subprocess.Popen[bytes], journal: Journal, stall: float) -> bool:
    """Until the end; False when there was no progress for `stall` seconds."""
    progress = Progress(process.pid, journal, stall, time.monotonic())
    while True:
        try:
            process.wait(timeout=min(1.0, stall))
            return True
        except subprocess.TimeoutExpired:
            if progress.is_over(time.monotonic()):
                return False


class Progress:
    """What tells work from waiting for W&B: acknowledgements, a look at a run of which all is told so far, and what the
    processes of a group write, sockets included."""

    def __init__(self, group: int, journal: Journal, stall: float, now: float):
        self.group, self.journal, self.stall = group, journal, stall
        self.since, self.reached, self.written = now, self._reached(), written_by(group)

    def is_over(self, now: float) -> bool:
        """Whether there was none for `stall` seconds. now: as time.monotonic() has it."""
        reached, written = self._reached(), written_by(self.group)
        grown = sum(count - self.written.get(pid, 0) for pid, count in written.items())
        if reached != self.reached or grown >= LEAST_TRAFFIC * self.stall:
            self.since, self.reached, self.written = now, reached, written
        return now - self.since > self.stall

    def _reached(self) -> list[int]:
        found = [path.stat() for path in (self.journal.done_file, self.journal.idle_file) if path.exists()]
        return [number for stat in found for number in (stat.st_size, stat.st_mtime_ns)]


def written_by(group: int) -> dict[int, int]:
    """Process of the group -> bytes that it has written so far (/proc/PID/io, `wchar`); none without /proc."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it has ended, or is somebody else's
            if os.getpgid(int(place.name)) == group:
                lines = (place / "io").read_text().splitlines()
                found[int(place.name)] = int(next(line for line in lines if line.startswith("wchar:")).split()[1])
    return found


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """The SDK's own service process, too, and what they leave behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    sweep()


if __name__ == "__main__":
    sys.exit(main())
