"""Which artifact store a command looks at: env.toml's, or with `--profile` the one of a cluster behind ssh."""

from __future__ import annotations

import click

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.spec import Artifact

PROFILE = click.option("-p", "--profile", metavar="PROFILE", help="The store of a profile that is reached over SSH.")


def store_of(profile: str | None) -> Store:
    """UserError: there is no such profile, or its machine can't be asked."""
    if profile is None:
        return Store(read_environment().store)
    from nemotron_recipes import lifecycle

    return lifecycle.store_of(profile)


def verify(profile: str | None, artifact: Artifact) -> None:
    """Read all the data of a version where they lie. UserError: they are not what was recorded."""
    if profile is None:
        store_of(None).verify(artifact)
    else:
        from nemotron_recipes import lifecycle

        lifecycle.verify(profile, artifact)
