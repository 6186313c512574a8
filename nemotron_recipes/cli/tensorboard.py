"""`nemotron runs tensorboard RUN`: metrics.jsonl as TensorBoard files, for whoever has that open already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nemotron_recipes import closing, lifecycle
from nemotron_recipes.artifacts.records import RunView, find_run
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.rundir import RunDir

LEFT_OUT = ("step", "steps", "time")


@click.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
def tensorboard(run: str, follow: bool) -> None:
    """Write the metrics of a run as TensorBoard files, into STAGE/metrics-tensorboard of its folder."""
    view = lifecycle.load(find_run(read_environment().output / "runs", run))
    writers = {stage.name: _Writer(view, stage.name) for stage in view.stages}

    def poll(outlook: object = None) -> None:
        for writer in writers.values():
            writer.poll()

    poll()
    if follow and view.handle is not None:
        lifecycle.watch(view.handle, poll)
    for writer in writers.values():
        if writer.close():
            click.echo(printable(f"tensorboard --logdir {writer.folder}"))
    if not any(writer.rows for writer in writers.values()):
        raise UserError(Problem(f"run {view.id} has logged no metrics yet", view.path))


class _Writer:
    """One stage. What an earlier call wrote is replaced: two files with the same steps would draw zigzags."""

    def __init__(self, view: RunView, stage: str):
        self.stage = RunDir(Path(view.path)).stage(stage)
        # `tensorboard` may hold what a trainer has written itself.
        self.folder = self.stage.path / "metrics-tensorboard"
        self.rows = 0
        self._writer: Any = None

    def poll(self) -> None:
        rows = closing.metrics(self.stage)
        if rows and self._writer is None:
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._writer = _summary_writer(self.folder)
        for row in rows[self.rows :]:
            for key, value in row.items():
                if key not in LEFT_OUT and isinstance(value, (int, float)):
                    self._writer.add_scalar(key, value, row["step"], walltime=row.get("time"))
        self.rows = len(rows)

    def close(self) -> bool:
        """Whether anything was written."""
        if self._writer is not None:
            self._writer.close()
        return self._writer is not None


def _summary_writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:
        fix = "pip install 'nemotron-recipes[tensorboard]'"
        raise UserError(Problem("TensorBoard files need the package 'tensorboardX'", fix=fix)) from None
    return SummaryWriter(str(folder))
