"""Stages as processes of this machine, which NeMo-Run adopts: the `Runner` of executor `local`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from nemotron_recipes.executors import memory, nemo_adapter
from nemotron_recipes.executors.driver import Blamed
from nemotron_recipes.executors.local import process_tree
from nemotron_recipes.rundir import ATTEMPT_ENV, RUN_ID_ENV, RunDir
from nemotron_recipes.spec import RenderedStage, Tree


class LocalRunner:
    """See `driver.Runner`."""

    def __init__(self, run: RunDir, inherited: dict[str, str], plan: Tree):
        self.run, self.inherited = run, inherited
        self.native: Tree = {}

    def close(self) -> None:
        pass

    @contextmanager
    def launched(
        self, stage: RenderedStage, attempt: int, job: str, log: Path, unwanted: Callable[[], bool]
    ) -> Iterator[Process]:
        environ = {**self.inherited, ATTEMPT_ENV: str(attempt), **stage.env}
        with open(log, "ab", buffering=0) as output:
            process = subprocess.Popen(
                stage.argv, env=environ, cwd=stage.cwd, stdout=output, stderr=output, start_new_session=True
            )
        with ExitStack() as closed_afterwards:
            adopted = nemo_adapter.adopted(stage, process, self.run.path / "nemo_run", job)
            yield Process(process, stage.env[RUN_ID_ENV], lambda: closed_afterwards.enter_context(adopted))


class Process:
    """See `driver.Started`."""

    def __init__(self, process: subprocess.Popen[bytes], run_id: str, adopt: Callable[[], None]):
        self.process, self.run_id, self._adopt = process, run_id, adopt
        self.told: Tree = {"pid": process.pid}

    def make_known(self) -> None:
        self._adopt()

    def wait(self, seconds: float) -> bool:
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ask(self) -> None:
        with suppress(psutil.NoSuchProcess):
            process_tree.ask(psutil.Process(self.process.pid))

    def stop(self, grace: float) -> None:
        if self.process.poll() is not None:
            return
        survivors = process_tree.stop(self.run_id, grace, [psutil.Process(self.process.pid)])
        if survivors:
            print(f"processes that SIGKILL did not end: {survivors}", file=sys.stderr)
        self.process.wait()

    def ended(self) -> tuple[int, str]:
        code = self.process.returncode
        return (code if code >= 0 else 128 - code), ""

    def shortage(self, limit: float | None) -> str:
        return memory.shortage(limit, memory.read_memory())

    def blamed(self, log: Path) -> Blamed:
        return Blamed(log)
