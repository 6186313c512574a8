"""`nemotron runs watch [RUN]`: queue, progress, loss curve and memory as they change; plain lines off a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts.records import RunView, find_run, run_folders
from nemotron_recipes.cli import attach
from nemotron_recipes.cli.chart import Curve, chart
from nemotron_recipes.cli.follow import progress_text, waiting_news, waiting_text
from nemotron_recipes.cli.tail import Tail
from nemotron_recipes.cli.text import age, duration, table
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.pulse import Beat, read_beats
from nemotron_recipes.rundir import RunDir, StageDir
from nemotron_recipes.spec import JobHandle, Outlook

LOOK_SECONDS = 1.0  # how often files are read
PLAIN_SECONDS = 10.0  # without a terminal: how often at most progress is told
GOES_ON = ("pending", "running", "stalled")
NEWEST = 15
RANKS = 8  # shown one by one


@click.command()
@click.argument("run", required=False)
@click.option("-n", "--number", type=click.IntRange(min=1), default=NEWEST, show_default=True, help="Newest N runs.")
def watch(run: str | None, number: int) -> int:
    """Watch RUN, or the newest runs: queue, progress, loss curve, GPU memory. Ctrl-C ends the watching alone.

    Without a terminal plain lines tell what changes, until all has ended.
    """
    root = read_environment().output / "runs"
    with _screen() as show:
        if run is None:
            return _watch_all(root, number, show)
        view = lifecycle.load(find_run(root, run))
        if view.handle is None:
            raise UserError(Problem(f"{view.id} was never submitted", view.path))
        board = Board(view.id, RunDir(Path(view.path)))
        code = _watch_one(view.handle, board, show)
    click.echo(printable(f"{view.id}: {lifecycle.load(Path(view.path)).state}"))
    return code


class Board:
    """What is to be seen of a run, read a little at a time."""

    def __init__(self, name: str, run: RunDir):
        self.name, self.run = name, run
        self.events = Tail(run.events)
        self.stages: dict[str, str] = {}  # stage -> what was said of it last
        self.stage: StageDir | None = None
        self.attempt = 0
        self.metrics: Tail | None = None
        self.row: dict[str, Any] | None = None
        self.curve = Curve()
        self.beats: tuple[Beat, ...] = ()
        self.queue: dict[str, str] = {}  # what is news of it -> the words
        self.before = ""  # words on the run that must be over first
        self.end = ""

    def look(self, outlook: Outlook | None) -> None:
        """Read what is new."""
        for event in self.events.rows():
            self._note(event)
        for row in self.metrics.rows() if self.metrics else ():
            if "loss" in row:  # a validation has a row of its own
                self.row = row
                self.curve.add(row["step"], row["loss"])
        if self.stage is not None:
            self.beats = read_beats(self.stage, self.attempt)
        if outlook is not None:
            self.queue = {"silent": f"Slurm does not answer: {outlook.unreachable}"} if outlook.unreachable else {}
            self.queue |= {waiting_news(job): waiting_text(job) for job in outlook.jobs if job.waiting}

    @property
    def waits(self) -> dict[str, str]:
        """Why it waits, as far as it does: what is news of it -> the words."""
        return ({self.before: self.before} if self.before else {}) | self.queue

    def lines(self, width: int, height: int) -> list[str]:
        """The whole picture, safe to be printed; a curve takes the room that is left."""
        head = [f"{self.name}", *(f"  queue   {text}" for text in self.waits.values())]
        head += [f"  stage   {name}: {state}" for name, state in self.stages.items()]
        head += [f"  end     {self.end}"] if self.end else []
        tail = [f"  memory  {text}" for text in memory_texts(self.beats)]
        if self.row is not None:
            tail.insert(0, f"  now     {progress_text(self.row)}")
        curve = chart(self.curve.values, width - 2, max(0, min(12, height - len(head) - len(tail) - 3)))
        body = ["", "  loss", *(f"  {line}" for line in curve), ""] if curve else []
        return [one_line(line)[:width] for line in [*head, *body, *tail]][:height]

    def _note(self, event: dict[str, Any]) -> None:
        name, stage = event["event"], str(event.get("stage"))
        if name == "stage-started":
            self.stage, self.attempt = self.run.stage(stage), event["attempt"]
            self.metrics, self.row, self.curve, self.beats = Tail(self.stage.metrics), None, Curve(), ()
            self.stages[stage] = "running" + (f", attempt {self.attempt}" if self.attempt > 1 else "")
        elif name == "stage-exited":
            self.stages[stage] = f"exit {event['exit_code']} after {duration(event['seconds'])}"
        elif name == "requeued":
            self.stages[stage] = f"back in the queue ({event['cause']})"
        elif name == "job-accepted":
            self.stages[stage] = f"job {event['job']}"
        elif name == "waiting":
            self.before = f"it waits until {event['run']} is over"
        elif name in ("finished", "cancelled"):
            self.end = str(event.get("state", name))
        if name in ("submitted", "submitting", "driver-started", "stage-started"):
            self.before = self.end = ""


def memory_texts(beats: tuple[Beat, ...]) -> Iterator[str]:
    """GPU memory by rank, what torch holds now and has held at most; of many ranks the extremes."""
    told = [beat for beat in beats if beat.memory is not None and beat.memory_peak is not None]
    for beat in told if len(told) <= RANKS else ():
        yield f"rank {beat.rank} on {beat.host}: {_gib(beat.memory)}, at most {_gib(beat.memory_peak)}"
    if len(told) > RANKS:
        least, most = (pick(told, key=lambda beat: beat.memory or 0) for pick in (min, max))
        yield f"{len(told)} GPUs: {_gib(least.memory)} (rank {least.rank}) to {_gib(most.memory)} (rank {most.rank})"


def one_line(text: str) -> str:
    """Safe on a terminal, and no more than the line that it is meant to be."""
    return printable(text).replace("\n", "\\n").replace("\t", " ")


def _gib(count: int | None) -> str:
    return f"{(count or 0) / 2**30:.2f} GiB"


class _Plain:
    """Lines for whoever reads no screen: what has changed, and now and then how far it is."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        self.told = 0.0

    def board(self, board: Board, last: bool = False) -> None:
        for number, (news, text) in enumerate(board.waits.items()):
            self._once(f"queue {number}", f"queue   {text}", news)
        for name, state in board.stages.items():
            self._once(name, f"stage   {name}: {state}")
        if board.end:
            self._once("end", f"end     {board.end}")
        now = time.monotonic()
        if board.row is not None and (last or now - self.told > PLAIN_SECONDS):
            self.told = now
            self._once("row", f"now     {progress_text(board.row)}")
            for number, text in enumerate(memory_texts(board.beats)):
                self._once(f"memory {number}", f"memory  {text}")

    def table(self, lines: list[str]) -> None:
        for line in lines[1:]:
            self._once(line.split()[0], line)

    def _once(self, key: str, text: str, news: str = "") -> None:
        if self.said.get(key) != (news or text):
            self.said[key] = news or text
            click.echo(one_line(text))


class _Live:
    """A screen of its own, redrawn in place."""

    def __init__(self, live: Any):
        self.live = live

    def board(self, board: Board, last: bool = False) -> None:
        size = self.live.console.size
        self._draw(board.lines(size.width, size.height))

    def table(self, lines: list[str]) -> None:
        size = self.live.console.size
        self._draw([one_line(line)[: size.width] for line in lines][: size.height])

    def _draw(self, lines: list[str]) -> None:
        from rich.text import Text

        self.live.update(Text("\n".join(lines), no_wrap=True), refresh=True)  # text, never rich's markup


@contextmanager
def _screen() -> Iterator[_Plain | _Live]:
    if not sys.stdout.isatty():
        yield _Plain()
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        yield _Live(live)


def _watch_one(handle: JobHandle, board: Board, show: _Plain | _Live) -> int:
    looked = 0.0

    def poll(outlook: Outlook | None) -> None:
        nonlocal looked
        if time.monotonic() - looked >= LOOK_SECONDS:
            looked = time.monotonic()
            board.look(outlook)
            show.board(board)

    lifecycle.watch(handle, poll)
    board.look(None)
    show.board(board, last=True)
    return attach.exit_code(lifecycle.load(board.run.path))


def _watch_all(root: Path, number: int, show: _Plain | _Live) -> int:
    began = time.monotonic()
    while True:
        views = lifecycle.load_all(run_folders(root, number))
        if not views:
            raise UserError(f"no runs yet in {root}")
        show.table(_listed(views))
        going = [view for view in views if view.state in GOES_ON]
        if not going and isinstance(show, _Plain):
            return 0
        most = max([lifecycle.ask_seconds(view.handle) for view in going if view.handle], default=LOOK_SECONDS)
        time.sleep(max(LOOK_SECONDS, min(most, (time.monotonic() - began) / 10)))


def _listed(views: list[RunView]) -> list[str]:
    rows = []
    for view in sorted(views, key=lambda view: view.state not in GOES_ON):
        stage = next((stage for stage in view.stages if stage.state in ("running", "stalled")), None)
        where, row = "", None
        if stage is not None:
            where = stage.name
            row = last_row(RunDir(Path(view.path)).stage(stage.name))
        rows.append((view.id, view.state, age(view.created), where, progress_text(row) if row else ""))
    return table(("RUN", "STATE", "CREATED", "STAGE", "PROGRESS"), rows).splitlines()


def last_row(stage: StageDir) -> dict[str, Any] | None:
    """The newest row of the metrics that has a loss, from the end of the file, however long that is."""
    found = [row for row in Tail(stage.metrics, last=65536).rows() if "loss" in row]
    return found[-1] if found else None
