"""The artifact store of a profile: of a cluster behind ssh there is a copy here of what is known without the data."""

from __future__ import annotations

import hashlib

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.remote import replica, there_changes, transport
from nemotron_recipes.lifecycle.preparing import site_of
from nemotron_recipes.planning import there
from nemotron_recipes.spec import Artifact


def store_of(profile: str) -> Store:
    """To be read only, where it is a copy, which is brought up to date by this.

    UserError: there is no such profile, the machine can't be reached, or it has no store yet.
    """
    with site_of(profile, read_environment()) as (site, homes):
        if homes is None:
            return Store(site.store)
        where = transport.current()
        if not transport.call(there.exists, str(site.store)):
            what = f"{where.name} has no artifact store yet"
            raise UserError(Problem(what, str(site.store), "run what makes the first artifact"))
        key = hashlib.sha256(f"{where.native['remote']} {site.store}".encode()).hexdigest()[:16]
        near = homes.with_name("stores") / key
        try:
            replica.refresh(where.call, str(site.store), near, changes=there_changes.of_store)
        except OSError as error:
            what = f"the artifact store of {where.name} can't be read: {error.strerror}"
            raise UserError(Problem(what, str(site.store))) from None
        return Store(near, str(site.store))


def verify(profile: str, artifact: Artifact) -> None:
    """Read all the data of a version where they lie. UserError: they are not what was recorded."""
    with site_of(profile, read_environment()) as (site, _):
        transport.call(there.verify, str(site.store), f"{artifact.name}:v{artifact.version}")
