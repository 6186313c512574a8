"""The end of a run whose driver was killed, put together from what its containers and its folder say."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from nemotron_recipes.closing import close
from nemotron_recipes.executors import driver, torchrun
from nemotron_recipes.executors.docker import files
from nemotron_recipes.executors.docker.control import Container, Docker, Refused, Unreachable
from nemotron_recipes.executors.docker.places import daemon_of, hosts_of
from nemotron_recipes.executors.hosts import copies
from nemotron_recipes.executors.hosts.network import Host
from nemotron_recipes.executors.remote import transport
from nemotron_recipes.executors.remote.left_behind import remove_secrets
from nemotron_recipes.executors.verdict import failure_cause
from nemotron_recipes.rundir import RunDir, StageDir, append_event, read_json, read_jsonl
from nemotron_recipes.spec import JobHandle, Tree


def settle(handle: JobHandle) -> list[Tree]:
    """The events that its driver would have written; none while anything runs or can't be asked."""
    run = RunDir(Path(handle.run_dir))
    started = [event for event in read_jsonl(run.events) if event["event"] == "stage-started"][-1:]
    try:
        found = _containers(handle, started[0]) if started else []
    except (Refused, Unreachable):
        return []
    if not any(container for _, _, container in found):
        with suppress(OSError):
            remove_secrets(run, files.secrets(run))
        _clear(handle, run)
        return []
    if any(container and container.running for _, _, container in found):
        return []
    with suppress(OSError, Refused, Unreachable, transport.Unreachable):
        for host, _, _ in found:
            copies.Back(host, run).refresh()
    missing = _ending(run, [container.exit_code if container else files.KILLED for _, _, container in found])
    with suppress(OSError, Refused, Unreachable, transport.Unreachable):  # somebody else's run: only read
        for event in missing:
            append_event(run.events, **event)
        close(run)
        files.secrets(run).unlink(missing_ok=True)
        for host, docker, container in found:
            if container:
                docker.remove(container.id)
            copies.clear(host, run)
    return missing


def _clear(handle: JobHandle, run: RunDir) -> None:
    """What a driver that was killed while it copied has left on other hosts, secrets perhaps.

    Not once a new driver is at work: from its start it takes seconds to look for the network, and then it copies.
    """
    for host in hosts_of(handle)[1:]:
        with suppress(OSError, transport.Unreachable):
            if driver.is_over(run.path):
                copies.clear(host, run)


def _containers(handle: JobHandle, started: Tree) -> list[tuple[Host, Docker, Container | None]]:
    """The stage's, the first host's first. Refused; Unreachable."""
    ids = [started["containers"][name] for name in started["hosts"]] if "hosts" in started else [started["container"]]
    machines = hosts_of(handle)[: len(ids)]
    found = []
    for host, id_ in zip(machines, ids, strict=True):
        docker = daemon_of(host, handle)
        found.append((host, docker, docker.container(id_)))
    return found


def _ending(run: RunDir, codes: list[int]) -> list[Tree]:
    """What a driver would have written of the end of the newest stage, of whose containers docker says `codes`."""
    events = list(read_jsonl(run.events))
    started = [event for event in events if event["event"] == "stage-started"][-1]
    name, attempt = started["stage"], started["attempt"]
    stage, plan = StageDir(run.stage(name).path), read_json(run.plan) or {"stages": []}
    reports = [files.read_report(stage, attempt, node) for node in range(len(codes))]
    ends = [report.exit_code if report else code or files.KILLED for report, code in zip(reports, codes, strict=True)]
    node = next((node for node, code in enumerate(ends) if code), 0)
    report, code, log = reports[node], ends[node], stage.launcher_log(attempt, node)
    seconds = round(max(0.0, (report.time if report else time.time()) - started["time"]), 3)
    failure = torchrun.first_failure(log) if code else None
    exited: Tree = {"event": "stage-exited", "stage": name, "attempt": attempt, "exit_code": code, "seconds": seconds}
    told = any((e["event"], e.get("stage"), e.get("attempt")) == ("stage-exited", name, attempt) for e in events)
    fingerprints = {planned["name"]: planned["fingerprint"] for planned in plan["stages"]}
    cause = failure_cause(stage, fingerprints[name], attempt, code, failure, log)
    end: Tree = {"event": "finished", "state": "succeeded"}
    if cause:
        cause = f"{started['hosts'][node]}: {cause}" if len(codes) > 1 else cause
        end = {"event": "finished", "state": "failed", "stage": name, "cause": cause}
    elif name != plan["stages"][-1]["name"]:
        cause = "its driver was killed before the next stage could start; submit it again to go on"
        end = {"event": "finished", "state": "failed", "stage": None, "cause": cause}
    return [end] if told else [exited, end]
