"""Docker's own command, asked without a shell and never for long.

The command, not the SDK: what a dry run prints is then what runs, byte for byte, and contexts and rootless daemons work
as their users expect. NeMo-Run's DockerExecutor (0.11.1) reports every container as succeeded, puts secrets into the
container's environment, where `docker inspect` shows them, and loses a container whose connection breaks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron_recipes.errors import NemotronError

RUN_LABEL = "nemotron.run"
STAGE_LABEL = "nemotron.stage"

_ASK_SECONDS = 60.0  # a daemon answers in milliseconds, while it unpacks an image in seconds
_HOST_ENV = "DOCKER_HOST"
# As docker's command and Go's network library say it. Asking the daemon afterwards is no proof: it may be back by then.
_NO_CONNECTION = re.compile(
    r"cannot connect to the docker daemon|error during connect|failed to connect to the docker|dial (unix|tcp)"
    r"|connection (refused|reset)|broken pipe|unexpected EOF|: EOF$",
    re.IGNORECASE,
)


class Unreachable(NemotronError):
    """No docker command here, or its daemon does not answer. The text says which."""


class Refused(NemotronError):
    """The daemon answered no, in these words."""


@dataclass(frozen=True)
class Container:
    """What docker says of a container. `exit_code` counts once it does not run any more."""

    id: str
    running: bool
    exit_code: int = 0
    out_of_memory: bool = False


@dataclass(frozen=True)
class Docker:
    """One daemon, by its endpoint (`unix://...`)."""

    host: str

    def ask(self, *arguments: str, seconds: float = _ASK_SECONDS, environ: Mapping[str, str] = os.environ) -> str:
        """stdout of `docker ARGUMENTS`. Unreachable or Refused when it fails."""
        argv = ("docker", *arguments)
        try:
            done = subprocess.run(
                argv,
                env=self.environment(environ),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
            )
        except FileNotFoundError:
            raise Unreachable("there is no docker command here") from None
        except subprocess.TimeoutExpired:
            raise Unreachable(f"docker {arguments[0]} did not answer within {seconds:.0f} s") from None
        if done.returncode == 0:
            return done.stdout
        words = done.stderr.strip() or f"docker {arguments[0]} ended with exit code {done.returncode}"
        if arguments[0] != "version" and not _NO_CONNECTION.search(words):
            self.ask("version", "--format", "{{.Server.Version}}", seconds=seconds)  # Unreachable, if it is that
            raise Refused(words)
        raise Unreachable(words)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`docker ARGUMENTS` as a child whose end tells something; with nobody at its pipe, its first word ends it."""
        silent, environ = subprocess.DEVNULL, self.environment(os.environ)
        argv = ("docker", *arguments)
        return subprocess.Popen(argv, env=environ, stdin=silent, stdout=subprocess.PIPE, stderr=silent)

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """For docker commands: this daemon, whatever $DOCKER_HOST and contexts say."""
        return {**environ, _HOST_ENV: self.host}

    def container(self, name: str) -> Container | None:
        """The container of that name or id; None when there is none."""
        try:
            (told,) = json.loads(self.ask("container", "inspect", name))
        except Refused as error:
            if "no such container" in str(error).lower():
                return None
            raise
        state = told["State"]
        running = bool(state["Running"]) or state.get("Status") in ("created", "restarting", "removing")
        return Container(told["Id"], running, int(state["ExitCode"]), bool(state.get("OOMKilled")))

    def containers(self, run_id: str, stage: str | None = None) -> list[str]:
        """Ids of the containers of a run, or of one of its stages; ended ones too."""
        labels = [f"{RUN_LABEL}={run_id}", *([f"{STAGE_LABEL}={stage}"] if stage else [])]
        filters = [word for label in labels for word in ("--filter", f"label={label}")]
        return self.ask("ps", "--all", "--no-trunc", *filters, "--format", "{{.ID}}").split()

    def image(self, reference: str) -> dict[str, Any] | None:
        """What docker says of an image on this machine; None when it is not here."""
        try:
            (told,) = json.loads(self.ask("image", "inspect", reference))
        except Refused as error:
            if "no such image" in str(error).lower():
                return None
            raise
        return dict(told)

    def info(self) -> dict[str, Any]:
        """`docker info` as JSON."""
        return dict(json.loads(self.ask("info", "--format", "{{json .}}")))

    def is_podman(self) -> bool:
        """Whether Podman's service answers in docker's place."""
        told = json.loads(self.ask("version", "--format", "{{json .Server}}"))
        return any("podman" in component["Name"].lower() for component in told.get("Components") or [])

    def stop(self, name: str, grace: float) -> None:
        """SIGTERM, and SIGKILL after `grace` seconds; returns when it has ended. Fine when it is gone."""
        try:
            self.ask("stop", "-t", str(max(0, round(grace))), name, seconds=grace + _ASK_SECONDS)
        except Refused as error:
            if "no such container" not in str(error).lower():
                raise

    def remove(self, name: str) -> None:
        """Remove a container with its log. Fine when it is gone."""
        try:
            self.ask("rm", "--force", "--volumes", name)
        except Refused as error:
            if "no such container" not in str(error).lower() and "already in progress" not in str(error).lower():
                raise


def endpoint(given: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Where docker commands go: `given`, $DOCKER_HOST, or the current context. Unreachable: no docker command."""
    told = given or environ.get(_HOST_ENV)
    if told:
        return told
    argv = ("docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
    try:
        done = subprocess.run(argv, env=dict(environ), capture_output=True, text=True, timeout=_ASK_SECONDS)
    except FileNotFoundError:
        raise Unreachable("there is no docker command here") from None
    if done.returncode:
        raise Unreachable(done.stderr.strip())
    return done.stdout.strip()
