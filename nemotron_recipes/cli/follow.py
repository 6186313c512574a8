"""Follow a run from its folder: its place in the queue, logs, a progress bar on a terminal, its end and exit code."""

from __future__ import annotations

import re
import time
from typing import Any

import click

from nemotron_recipes import closing
from nemotron_recipes.cli.tail import Tail
from nemotron_recipes.cli.text import clock, duration
from nemotron_recipes.errors import UserError, printable
from nemotron_recipes.rundir import Damaged, RunDir, StageDir
from nemotron_recipes.spec import JobFacts, Outlook

BAR = 24  # characters
STEP_LINE = re.compile(r"step \d+/\d+ \[")  # the workers' own bar in their log; a terminal shows one that moves
LOOK_SECONDS = 1.0  # how often new ranks' logs are looked for


class Follower:
    """Shows what is new of a run at every `poll`.

    stage   only this one
    rank    whose log to show; None: all of them, each line tagged
    quiet   nothing but the queue's news that somebody has to know: that Slurm does not answer
    """

    def __init__(
        self, run: RunDir, stage: str | None = None, rank: int | None = 0, bar: bool = False, quiet: bool = False
    ):
        self.run, self.only, self.rank, self.bar, self.quiet = run, stage, rank, bar and rank is not None, quiet
        self.events = Tail(run.events)
        self.logs = _Logs(None, 0, rank)
        self.metrics: Tail | None = None
        self.drawn = False
        self.silent_since: float | None = None
        self.begun: set[str] = set()  # stages whose processes have started
        self.queued: dict[str, str] = {}  # job -> what was said of it last

    def poll(self, outlook: Outlook | None = None, last: bool = False) -> None:
        """Print new log lines, then news of the run; `last` also prints an unfinished line."""
        if not self.quiet:
            self._show_logs(last)
            for event in self.events.rows():
                self._show_event(event)
        if outlook is not None:
            self._show_queue(outlook)
        if not self.quiet:
            self._show_logs(last)

    def _show_queue(self, outlook: Outlook) -> None:
        if outlook.unreachable and self.silent_since is None:
            self.silent_since = time.monotonic()
            self._line(f"   Slurm does not answer ({outlook.unreachable}); following the run folder, and asking again")
        elif not outlook.unreachable and self.silent_since is not None:
            self._line(f"   Slurm answers again, after {duration(time.monotonic() - self.silent_since)}")
            self.silent_since = None
        waiting = [job for job in outlook.jobs if job.waiting and self.only in (None, job.stage)]
        for job in [job for job in waiting if job.reason != "Dependency"] or waiting[:1]:
            self.begun.discard(job.stage)
            self._tell_once(job, waiting_news(job), waiting_text(job))
        for job in outlook.jobs:  # a container's image may take minutes from here
            if (
                job.state in ("RUNNING", "CONFIGURING")
                and job.stage not in self.begun
                and self.only in (None, job.stage)
            ):
                self._tell_once(job, "starts", f"{job.stage}: job {job.job} has {job.nodes}; it starts")

    def _tell_once(self, job: JobFacts, key: str, text: str) -> None:
        if not self.quiet and self.queued.get(job.job) != key:
            self.queued[job.job] = key
            self._line(f"   {text}")

    def _show_event(self, event: dict[str, Any]) -> None:
        stage = event.get("stage")
        if stage is None or (self.only and stage != self.only):
            return
        if event["event"] == "stage-started":
            folder, attempt = self.run.stage(stage), event["attempt"]
            self.begun.add(stage)
            hosts = f" on {' '.join(event['hosts'])}" if event.get("hosts") else ""
            self._line(f"── {stage}" + (f" (attempt {attempt})" if attempt > 1 else "") + hosts)
            self.logs = _Logs(folder, attempt, self.rank)
            self.metrics = Tail(folder.metrics)
        elif event["event"] == "linked":
            for link in event["links"]:
                self._line(f"   {link}")
        elif event["event"] in ("link-down", "link-up"):
            how = "gone" if event["event"] == "link-down" else "back"
            self._line(f"   the network between the hosts is {how}: {event['words']}")
        elif event["event"] == "job-accepted":
            array = f", after the tasks of array {event['array']}" if event.get("array") else ""
            self._line(f"   {stage} is job {event['job']}{array}")
        elif event["event"] == "requeued":
            self._line(f"── {stage}: back in the queue ({event['cause']}), from step {event['step'] or 0}")
        elif event["event"] == "stage-exited":
            self._show_logs(last=True)
            self._line(f"── {stage}: exit {event['exit_code']}, {duration(event['seconds'])}")

    def _show_logs(self, last: bool) -> None:
        for tag, tail in self.logs.tails():
            for line in tail.lines(whole=not last):
                if not (self.bar and STEP_LINE.match(line)):
                    self._line(tag + line)
        if self.bar and self.metrics:
            steps = [row for row in self.metrics.rows() if "loss" in row]  # a validation has a row of its own
            if steps:
                self._draw(steps[-1])

    def _line(self, text: str) -> None:
        if self.drawn:
            click.echo("\r\x1b[K", nl=False)
            self.drawn = False
        click.echo(printable(text))

    def _draw(self, row: dict[str, Any]) -> None:
        click.echo(f"\r\x1b[K{progress_text(row)}", nl=False)
        self.drawn = True


class _Logs:
    """The logs of one rank of an attempt, or of all of them, as they come to be."""

    def __init__(self, stage: StageDir | None, attempt: int, rank: int | None):
        self.stage, self.attempt, self.rank = stage, attempt, rank
        self.found: dict[int, Tail] = {}
        self.looked = 0.0

    def tails(self) -> list[tuple[str, Tail]]:
        """(tag, log) by rank; with one rank the tag is empty."""
        if self.stage is None:
            return []
        if self.rank is not None:
            tail = self.found.setdefault(self.rank, Tail(self.stage.log(self.attempt, self.rank)))
            return [("", tail)]
        now = time.monotonic()
        if now - self.looked > LOOK_SECONDS:
            self.looked = now
            for rank in self.stage.ranks_with_logs(self.attempt):
                self.found.setdefault(rank, Tail(self.stage.log(self.attempt, rank)))
        return [(f"[rank {rank}] ", self.found[rank]) for rank in sorted(self.found)]


def waiting_text(job: JobFacts) -> str:
    """`sft is job 12, PENDING: jobs of higher priority wait ... (Priority); start about 14:05:00 (in 3:00)`"""
    why = f": {job.words}" if job.words else ""
    code = f" ({job.reason})" if job.reason else ""
    when = ""
    if job.start is not None and job.start > time.time():
        when = f"; start about {clock(job.start)} (in {duration(job.start - time.time())})"
    return f"{job.stage} is job {job.job}, {job.state}{why}{code}{when}"


def waiting_news(job: JobFacts) -> str:
    """What of `waiting_text` is worth to be told again when it changes: a start that moves by seconds is no news."""
    return f"{job.job} {job.state} {job.reason} {round(job.start / 300) if job.start else ''}"


def progress_text(row: dict[str, Any]) -> str:
    """A row of the metrics as one line: `[####....] step 2/4  loss 1.5000  4.0 s left`"""
    step, steps = row["step"], row["steps"]
    done = round(BAR * step / max(steps, 1))
    left = duration(max(steps - step, 0) * row.get("seconds_per_step", 0))
    loss = "nan" if row["loss"] is None else f"{row['loss']:.4f}"
    return f"[{'#' * done}{'.' * (BAR - done)}] step {step}/{steps}  loss {loss}  {left} left"


def show_logs(run: RunDir, stage: str, rank: int | None) -> None:
    """Print a stage's log of its newest attempt; of all ranks, one after the other, with `rank` None."""
    folder = run.stage(stage)
    attempt = folder.last_attempt()
    known = folder.ranks_with_logs(attempt)
    if not known or (rank is not None and rank not in known):
        what = f"{stage} has no log" + ("" if rank is None else f" of rank {rank}")
        raise UserError(what + (f"; there are ranks {known}" if known else " yet"))
    ended = closing.marks(run.path)
    for each in known if rank is None else [rank]:
        tag = f"[rank {each}] " if rank is None else ""
        try:
            closing.check(folder.log(attempt, each), ended)
        except Damaged as error:
            click.echo(f"warning: {printable(str(error))}", err=True)
        for line in Tail(folder.log(attempt, each)).lines(whole=False):
            click.echo(tag + printable(line))
