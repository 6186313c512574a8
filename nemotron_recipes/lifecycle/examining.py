"""What the machine or cluster behind a profile can do: `nemotron doctor`."""

from __future__ import annotations

import os

from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.executors import get_executor
from nemotron_recipes.executors.remote import sites, there, transport
from nemotron_recipes.lifecycle.preparing import checked_profile
from nemotron_recipes.lifecycle.reach import speaking_to
from nemotron_recipes.spec import Examination, Finding


def examine(profile: str, deep: float | None = None) -> Examination:
    """What the machine or cluster behind a profile, and the folders of env.toml, can do. UserError: no such profile.

    deep   look into the nodes as well, with a job that may wait so many seconds for its start
    """
    environment = read_environment()
    complete = checked_profile(environment, profile)
    places = {"output folder": str(environment.output), "artifact store": str(environment.store)}
    with speaking_to(sites.of_profile(complete)) as where:
        if where.name:
            places = {f"remote_job_dir on {where.name}": complete["remote_job_dir"]}
        executor = get_executor(complete["executor"])
        inside = Examination(())
        if deep is not None:
            shared, _ = transport.call(there.room, next(iter(places.values())))
            inside = executor.look_into_nodes(complete, shared, deep)
        found = executor.examine(complete)
        told = [said for name, folder in places.items() for said in transport.call(there.look_at, name, folder)]
    unset = [name for name in complete.get("secrets", ()) if not os.environ.get(name)]
    secrets = [Finding(f"secret {name}", "problem", f"not set: export {name}=... where runs begin") for name in unset]
    findings = (*found.findings, *(Finding(*said) for said in told), *secrets, *inside.findings)
    return Examination(findings, {**found.suggestion, **inside.suggestion} if found.suggestion else {})
