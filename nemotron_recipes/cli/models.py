"""`nemotron models fetch`: weights and data sets in the cache before a job asks for them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import click

from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError

_ID = re.compile(r"(?:hf://)?(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


@click.group()
def models() -> None:
    """Fetch weights and data sets from the hub before a job asks for them."""


@models.command("fetch")
@click.argument("names", nargs=-1, required=True, metavar="ORG/NAME[@REVISION]...")
@click.option("--data", is_flag=True, help="They are data sets, not models.")
@click.option("--to", "home", type=click.Path(file_okay=False, path_type=Path), help="HF_HOME to fill.")
@click.option("-r", "--run", "profile", metavar="PROFILE", help="Fill the hf_cache of this profile.")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def fetch(names: tuple[str, ...], data: bool, home: Path | None, profile: str | None, as_json: bool) -> None:
    """Bring whole repositories into the cache that jobs read, each at one commit; again after a failure, it goes on.

    Without --to and --run: $HF_HOME, or ~/.cache/huggingface. Jobs then need no network: HF_HUB_OFFLINE=1 in the
    profile's env.
    """
    from nemotron_recipes.artifacts import hub

    wanted = [_parsed(name) for name in names]
    target = _home(home, profile)
    made: list[dict[str, object]] = []
    problems: list[Problem] = []

    def say(text: str) -> None:
        click.echo(text, err=True)

    with hub.online():
        for name, revision in wanted:
            kind = "dataset" if data else "model"
            try:
                found = hub.look_up(name, revision, kind, say)
                say(f"{name}@{found.commit}: {len(found.files)} files, {found.bytes / 1e9:.1f} GB")
                folder = hub.fetch(found, target, say)
            except UserError as error:
                problems += error.problems
                continue
            made.append({"reference": f"hf://{name}@{found.commit}", "folder": str(folder), "bytes": found.bytes})
    if as_json:
        click.echo(json.dumps(made, indent=2))
    else:
        for entry in made:
            click.echo(f"{entry['reference']}\n  {entry['folder']}")
    if problems:
        raise UserError(*problems)


def _parsed(text: str) -> tuple[str, str | None]:
    match = _ID.fullmatch(text)
    if match is None:
        raise UserError(
            Problem(f"'{text}' is no repository of the hub", "command line", "ORG/NAME or ORG/NAME@REVISION")
        )
    return match["name"], match["revision"]


def _home(home: Path | None, profile: str | None) -> Path:
    if home is not None and profile is not None:
        raise UserError(Problem("--to and --run exclude each other", "command line", "name one folder"))
    if profile is not None:
        tree = read_environment().profile(profile)
        named = tree.get("hf_cache") or (tree.get("env") or {}).get("HF_HOME")
        if not named:
            raise UserError(Problem(f"profile '{profile}' has no hf_cache", "env.toml", "add one, or use --to FOLDER"))
        home = Path(named)
    default = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.path.abspath(os.path.expanduser(home or default)))
