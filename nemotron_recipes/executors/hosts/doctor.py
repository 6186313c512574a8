"""What `nemotron doctor` says of several hosts: each by itself, and the network between them, measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemotron_recipes.errors import NemotronError, UserError
from nemotron_recipes.executors.docker import doctor
from nemotron_recipes.executors.docker.profile import DockerProfile
from nemotron_recipes.executors.hosts import network
from nemotron_recipes.executors.hosts.network import NoLink
from nemotron_recipes.executors.remote import there
from nemotron_recipes.spec import Finding


def findings(profile: DockerProfile, hf_cache: Path) -> Iterator[Finding]:
    """Sends data between the hosts for some seconds."""
    machines = network.of_profile(profile)
    try:
        told, problems = network.ask_all(machines, "hosts")
    except UserError as error:  # what follows would be said of another machine
        told, problems, machines = {0: {}}, [*error.problems], machines[:1]
    problems += network.unlike(machines, told, "hosts")
    for problem in problems:
        yield Finding("hosts", "problem" if problem.refuses else "warning", f"{problem.what}: {problem.fix}")
    machines = [host for host in machines if host.node in told]
    for host in machines:
        try:
            for found in doctor.findings(profile, hf_cache, host.where):
                yield Finding(f"{host.name}: {found.topic}", found.state, found.text)
            if host.root:
                said = host.where.call(there.refusal, host.root)
                yield Finding(f"{host.name}: copies", "problem" if said else "ok", said or f"below {host.root}")
        except (NemotronError, OSError) as error:
            yield Finding(host.name, "problem", str(error))
    for host in machines[1:]:
        topic = f"{machines[0].name} - {host.name}"
        try:
            link = network.find_link(machines[0], host, profile.hosts_interface)
        except NoLink as error:
            yield Finding(topic, "problem", f"{error}: {error.fix}" if error.fix else str(error))
        except (NemotronError, OSError) as error:
            yield Finding(topic, "problem", str(error))
        else:
            slow = network.too_slow([machines[0], host], [link], profile.hosts_min_gbps)
            yield Finding(topic, "problem" if slow else "ok", slow or link.words(machines[0].name, host.name))
