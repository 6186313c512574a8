"""`nemotron env list | show`: what env.toml says, checked."""

from __future__ import annotations

import json
from typing import Any

import click

from nemotron_recipes.cli.text import table
from nemotron_recipes.config.profiles import Environment, read_environment
from nemotron_recipes.config.tree import flatten
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.planning.validate import check_run


@click.group()
def env() -> None:
    """Show the profiles of env.toml."""


@env.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def list_profiles(as_json: bool) -> None:
    """List the profiles, checked, and where runs and artifacts go."""
    environment = read_environment()
    problems = [problem for name, given in environment.profiles.items() for problem in _checked(name, given)[1]]
    if problems:
        raise UserError(*problems)
    if as_json:
        click.echo(json.dumps(_as_tree(environment), indent=2))
        return
    click.echo(f"env.toml  {environment.path or 'none found upwards from here; set $NEMOTRON_ENV or write one'}")
    click.echo(f"runs      {environment.output / 'runs'}\nartifacts {environment.store}")
    if environment.wandb:
        entity = environment.wandb.get("entity", "your default entity")
        click.echo(f"wandb     runs are mirrored to {entity}/{environment.wandb['project']}")
    if environment.profiles:
        rows = [(name, p["executor"], _fields(p)) for name, p in environment.profiles.items()]
        click.echo(table(("PROFILE", "EXECUTOR", "FIELDS"), rows))


@env.command("show")
@click.argument("profile")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def show_profile(profile: str, as_json: bool) -> None:
    """Show one profile in full: what it sets, what it extends and the executor's defaults."""
    given = read_environment().profile(profile)
    complete, problems = _checked(profile, given)
    if problems:
        raise UserError(*problems)
    if as_json:
        click.echo(json.dumps({"profile": profile, "fields": complete, "set": sorted(given)}, indent=2))
        return
    given_keys = flatten(given)
    rows = [
        (key, json.dumps(value), "profile" if key in given_keys else "default")
        for key, value in flatten(complete).items()
    ]
    click.echo(table(("FIELD", "VALUE", "FROM"), rows))


def _checked(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """A profile with its executor's defaults; or every field that the executor does not have or take."""
    return check_run(given, lambda key: f"profile [{name}]")


def _fields(profile: dict[str, Any]) -> str:
    """A profile's own settings on one line."""
    return printable(", ".join(f"{k}={v!r}" for k, v in profile.items() if k != "executor"))


def _as_tree(environment: Environment) -> dict[str, Any]:
    return {
        "path": str(environment.path) if environment.path else None,
        "runs": str(environment.output / "runs"),
        "store": str(environment.store),
        "wandb": dict(environment.wandb),
        "profiles": dict(environment.profiles),
    }
