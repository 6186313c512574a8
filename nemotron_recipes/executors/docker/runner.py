"""Stages as containers of this machine's docker daemon: the `Runner` of executor `docker`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotron_recipes.executors.docker import files
from nemotron_recipes.executors.docker.container import StageContainer, start
from nemotron_recipes.executors.docker.control import Docker, endpoint
from nemotron_recipes.executors.driver import Started
from nemotron_recipes.fsio import write_atomic
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import RenderedStage, Tree


class DockerRunner:
    """See `driver.Runner`."""

    def __init__(self, run: RunDir, inherited: dict[str, str], plan: Tree):
        self.run, self.plan, self.options = run, plan, plan["stages"][0]["placement"]["options"]
        self.secrets = {name: inherited[name] for stage in plan["stages"] for name in stage["placement"]["secrets"]}
        self.docker = Docker(endpoint(self.options["docker_host"]))
        self.native: Tree = {"docker_host": self.docker.host}
        if self.options.get("hosts"):
            from nemotron_recipes.executors.hosts import network

            given = {"docker_host": self.options["docker_host"]}
            self.native["hosts"] = [{**tree, **given} for tree in network.to_tree(network.of_options(self.options))]

    def close(self) -> None:
        files.secrets(self.run).unlink(missing_ok=True)

    @contextmanager
    def launched(
        self, stage: RenderedStage, attempt: int, job: str, log: Path, unwanted: Callable[[], bool]
    ) -> Iterator[Started]:
        if self.secrets:
            write_atomic(files.secrets(self.run), json.dumps(self.secrets), mode=0o600)
        try:
            if stage.elsewhere:
                from nemotron_recipes.executors.docker import hosts as docker_hosts

                with docker_hosts.launched(
                    docker_hosts.Given(self.run, self.plan, self.options, self.secrets), stage, attempt, log, unwanted
                ) as together:
                    yield together
                return
            container = StageContainer(self.docker, start(self.docker, stage.argv, attempt, {}), stage, attempt)
            try:
                yield container
            finally:
                container.close(log)
        finally:
            files.secrets(self.run).unlink(missing_ok=True)
