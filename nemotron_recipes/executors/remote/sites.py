"""Which machine a profile, a plan or a handle speaks of: this one, or a login node behind ssh."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import Problem
from nemotron_recipes.executors.remote.ssh import Remote, connection
from nemotron_recipes.executors.remote.ssh_login import Login
from nemotron_recipes.executors.remote.transport import Here, Transport
from nemotron_recipes.spec import JobHandle, Tree


def login_of(profile: Tree) -> Login | None:
    """How a profile's cluster is reached; None where it is this machine's. The profile has been checked."""
    if profile.get("tunnel") != "ssh":
        return None
    user, identity, config = (profile.get(name) for name in ("user", "identity", "ssh_config"))
    return Login(profile["host"], user, identity, config, profile.get("remote_python") or "python3")


def problems(profile: Tree, where: str) -> list[Problem]:
    """Why the cluster of a profile could not even be asked for."""
    if profile.get("tunnel") != "ssh":
        return []
    from nemotron_recipes.executors.slurm.profile import SlurmProfile, tunnel_problems  # pydantic: not to list runs

    found = tunnel_problems(SlurmProfile.model_validate(profile))
    told = [Problem(what, f"{where}, {field}", fix) for field, what, fix in found]
    files = {name: profile.get(name) for name in ("identity", "ssh_config")}
    return told + [
        Problem(f"{name} names {path}, which is not a file", where, "mend it in env.toml")
        for name, path in files.items()
        if path and not os.path.isfile(os.path.expanduser(path))
    ]


def of_profile(profile: Tree, near: Path | None = None, far: str = "") -> Transport:
    """The machine of a profile; with a run's folder, where that lies here and there."""
    login = login_of(profile)
    return Remote(connection(login), near, far) if login else Here()


def of_handle(handle: JobHandle) -> Transport:
    """The machine of a submitted run."""
    login = login_in(handle)
    return Remote(connection(login), Path(handle.run_dir), handle.native["remote"]["run_dir"]) if login else Here()


def login_in(handle: JobHandle) -> Login | None:
    """How the cluster of a submitted run is reached; None where it is this machine's."""
    told: dict[str, Any] | None = handle.native.get("remote")
    return Login(**{each.name: told[each.name] for each in fields(Login)}) if told else None
