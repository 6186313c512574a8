"""Follow a run from its folder: the log of one rank, a progress bar on a terminal, the end and its exit code."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.cli import summary
from nemotron_recipes.cli.text import duration
from nemotron_recipes.errors import UserError, printable
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import JobHandle

BAR = 24  # characters
STEP_LINE = re.compile(r"step \d+/\d+ \[")  # the workers' own bar in their log; a terminal shows one that moves


class Tail:
    """New whole lines of a growing file."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0

    def lines(self, whole: bool = True) -> Iterator[str]:
        """What has come since the last call; with `whole` unset, a last line without its end too."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            for line in handle:
                if whole and not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield line.decode("utf-8", "replace").rstrip("\r\n")


class Follower:
    """Shows what is new of a run at every `poll`; `stage` limits it to one stage."""

    def __init__(self, run: RunDir, stage: str | None = None, rank: int = 0, bar: bool = False):
        self.run, self.only, self.rank, self.bar = run, stage, rank, bar
        self.events = Tail(run.events)
        self.logs: list[tuple[str, Tail]] = []
        self.metrics: Tail | None = None
        self.drawn = False

    def poll(self, last: bool = False) -> None:
        """Print new log lines, then news of the run; `last` also prints an unfinished line."""
        self._show_logs(last)
        for line in self.events.lines():
            self._show_event(json.loads(line))
        self._show_logs(last)

    def _show_event(self, event: dict[str, Any]) -> None:
        stage = event.get("stage")
        if stage is None or (self.only and stage != self.only):
            return
        if event["event"] == "stage-started":
            folder, attempt = self.run.stage(stage), event["attempt"]
            self._line(f"── {stage}" + (f" (attempt {attempt})" if attempt > 1 else ""))
            self.logs = [(stage, Tail(folder.log(attempt, self.rank)))]
            self.metrics = Tail(folder.metrics)
        elif event["event"] == "job-accepted":
            self._line(f"   {stage} is job {event['job']}")
        elif event["event"] == "requeued":
            self._line(f"── {stage}: back in the queue ({event['cause']}), from step {event['step'] or 0}")
        elif event["event"] == "stage-exited":
            self._show_logs(last=True)
            self._line(f"── {stage}: exit {event['exit_code']}, {duration(event['seconds'])}")

    def _show_logs(self, last: bool) -> None:
        for _, tail in self.logs:
            for line in tail.lines(whole=not last):
                if not (self.bar and STEP_LINE.match(line)):
                    self._line(printable(line))
        if self.bar and self.metrics:
            rows = [json.loads(line) for line in self.metrics.lines()]
            steps = [row for row in rows if "loss" in row]  # a validation has a row of its own
            if steps:
                self._draw(steps[-1])

    def _line(self, text: str) -> None:
        if self.drawn:
            click.echo("\r\x1b[K", nl=False)
            self.drawn = False
        click.echo(text)

    def _draw(self, row: dict[str, Any]) -> None:
        step, steps = row["step"], row["steps"]
        done = round(BAR * step / max(steps, 1))
        left = duration(max(steps - step, 0) * row.get("seconds_per_step", 0))
        text = f"[{'#' * done}{'.' * (BAR - done)}] step {step}/{steps}  loss {row['loss']:.4f}  {left} left"
        click.echo(f"\r\x1b[K{text}", nl=False)
        self.drawn = True


def attached(prepared: lifecycle.Prepared, handle: JobHandle, as_json: bool) -> int:
    """Follow a run to its end. Ctrl-C stops its whole process tree. 0 succeeded, 1 failed, 130 cancelled."""
    run = RunDir(Path(handle.run_dir))
    follower = Follower(run, bar=sys.stdout.isatty())
    if not as_json:
        click.echo(f"run {handle.run}")
    with _stop_signals():
        try:
            lifecycle.watch(handle, (lambda: None) if as_json else follower.poll)
        except (KeyboardInterrupt, BrokenPipeError) as reason:  # nobody watches any more: as with a closed terminal
            with suppress(OSError):
                click.echo("\nstopping the run ...", err=True)
            lifecycle.cancel(handle)
            if isinstance(reason, BrokenPipeError):
                raise
    if not as_json:
        follower.poll(last=True)
    return finish(run, as_json)


def finish(run: RunDir, as_json: bool = False) -> int:
    """Say how a run ended; its exit code."""
    view = lifecycle.load(run.path)
    click.echo(json.dumps(summary.as_tree(view), indent=2) if as_json else summary.closing(view), err=False)
    return exit_code(view)


def exit_code(view: RunView) -> int:
    """0 succeeded, 130 cancelled, 1 anything else that has ended."""
    return {"succeeded": 0, "cancelled": 130}.get(view.state, 1)


def show_logs(run: RunDir, stage: str, rank: int, show: Callable[[str], None]) -> None:
    """Print a stage's log of its newest attempt."""
    folder = run.stage(stage)
    attempt = folder.last_attempt()
    log = folder.log(attempt, rank)
    if not log.exists():
        known = sorted(int(p.stem.removeprefix("rank-")) for p in folder.logs(attempt).glob("rank-*.log"))
        raise UserError(f"{stage} has no log of rank {rank}" + (f"; there are ranks {known}" if known else " yet"))
    for line in Tail(log).lines(whole=False):
        show(printable(line))


@contextmanager
def _stop_signals() -> Iterator[None]:
    """A closed terminal or a SIGTERM stops a followed run as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
