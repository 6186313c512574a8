"""Docker's own command, asked without a shell and never for long.

The command, not the SDK: what a dry run prints is then what runs, byte for byte, and contexts and rootless daemons work
as their users expect. NeMo-Run's DockerExecutor (0.11.1) reports every container as succeeded, puts secrets into the
container's environment, where `docker inspect` shows them, and loses a container whose connection breaks.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemotron_recipes.errors import NemotronError
from nemotron_recipes.executors.remote import there, transport

RUN_LABEL = "nemotron.run"
STAGE_LABEL = "nemotron.stage"

_ASK_SECONDS = 60.0  # a daemon answers in milliseconds, while it unpacks an image in seconds
_HOST_ENV = "DOCKER_HOST"
_NO_COMMAND = "there is no docker command here"
# As docker's command and Go's network library say it. Asking the daemon afterwards is no proof: it may be back by then.
_NO_CONNECTION = re.compile(
    r"cannot connect to the docker daemon|error during connect|failed to connect to the docker|dial (unix|tcp)"
    r"|connection (refused|reset)|broken pipe|unexpected EOF|: EOF$",
    re.IGNORECASE,
)


class Unreachable(NemotronError):
    """No docker command here, or its daemon does not answer. The text says which."""


class HostAway(Unreachable):
    """The machine of the daemon can't be reached."""


class Elsewhere(Unreachable):
    """The daemon is not on the machine that its commands run on."""


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
    """One daemon, by its endpoint (`unix://...`; "": what docker's command finds by itself) on some machine."""

    host: str
    where: transport.Transport = field(default=transport.HERE, compare=False)

    def ask(self, *arguments: str, seconds: float = _ASK_SECONDS, more: Mapping[str, str] | None = None) -> str:
        """stdout of `docker ARGUMENTS`, with `more` in its environment. Unreachable or Refused when it fails."""
        said = self._run(*arguments, seconds=seconds, more=more)
        if said["code"] == 0:
            return str(said["out"])
        words = said["err"].strip() or f"docker {arguments[0]} ended with exit code {said['code']}"
        if arguments[0] != "version" and not _NO_CONNECTION.search(words):
            self.ask("version", "--format", "{{.Server.Version}}", seconds=seconds)  # Unreachable, if it is that
            raise Refused(words)
        raise Unreachable(words)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`docker ARGUMENTS` as a child whose end tells something; with nobody at its pipe, its first word ends it."""
        words = [f"{name}={value}" for name, value in self._daemon.items()]
        return self.where.start(["env", *words, "docker", *arguments])

    def command(self, *arguments: str) -> list[str]:
        """argv that runs `docker ARGUMENTS` with this process's terminal."""
        daemon = ["--host", self.host] if self.host else []
        return self.where.at_terminal(["docker", *daemon, *arguments])

    def _run(
        self, *arguments: str, seconds: float = _ASK_SECONDS, more: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        try:
            said = self.where.call(there.run, ["docker", *arguments], seconds, {**(more or {}), **self._daemon})
        except transport.Unreachable as error:
            raise HostAway(str(error)) from None
        if said.get("missing"):
            raise Unreachable(_NO_COMMAND)
        if said.get("late"):
            raise Unreachable(f"docker {arguments[0]} did not answer within {seconds:.0f} s")
        return dict(said)

    @property
    def _daemon(self) -> dict[str, str]:
        """This daemon, whatever $DOCKER_HOST and contexts say."""
        return {_HOST_ENV: self.host} if self.host else {}

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

    def logs(self, name: str) -> str:
        """The last lines that a container itself has printed."""
        said = self._run("logs", "--tail", "200", name)
        return f"{said['out']}{said['err']}"

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


def how_to_reach(error: Unreachable) -> str:
    """What to do about it."""
    words = str(error)
    if isinstance(error, Elsewhere):
        return "start the run on that machine"
    if "no docker command" in words:
        return "install docker: https://docs.docker.com/engine/install"
    if "permission denied" in words:
        return "join the group docker (sudo usermod -aG docker $USER, then log in again), or use a rootless daemon"
    return (
        "start the daemon (sudo systemctl start docker), or name another: docker_host in the profile, or $DOCKER_HOST"
    )


def advice(words: str) -> str:
    """What to do where docker can't start a container, and says so in these words; "" where nothing is known."""
    if "could not select device driver" in words or "nvidia" in words.lower():
        return 'install the NVIDIA container toolkit and restart docker, or set gpus = "none"'
    if "rlimit" in words:
        return "this host allows no such limit: set ulimits in the profile"
    return ""


def endpoint(given: str | None, where: transport.Transport = transport.HERE) -> str:
    """Where docker commands go there: `given`, $DOCKER_HOST, or the current context. Unreachable: no docker command.

    And Elsewhere: it is no socket of that machine. Docker would reach some by an ssh that keeps rules of its own.
    """
    told = given or _named(where)
    if not told.startswith("unix://"):
        raise Elsewhere(f"its daemon is at {told}, where folders of this machine can't be mounted")
    return told


def _named(where: transport.Transport) -> str:
    try:
        told = where.call(there.variable, _HOST_ENV)
        if told:
            return str(told)
        argv = ["docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]
        said = where.call(there.run, argv, _ASK_SECONDS)
    except transport.Unreachable as error:
        raise HostAway(str(error)) from None
    if said.get("missing"):
        raise Unreachable(_NO_COMMAND)
    if said.get("late") or said["code"]:
        raise Unreachable(said.get("err", "").strip() or "docker context inspect did not answer")
    return str(said["out"]).strip()
