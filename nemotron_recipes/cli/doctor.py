"""`nemotron doctor PROFILE`: what the machine or cluster behind a profile can do, before the first run on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from nemotron_recipes import lifecycle
from nemotron_recipes.cli.text import table

PATIENCE = 600  # seconds for the job of --deep to start
_MARKS = {"ok": "ok", "warning": "WARNING", "problem": "PROBLEM"}


@click.command()
@click.argument("profile")
@click.option("--deep", is_flag=True, help="Look into the nodes, too: a short job on as many as the profile has.")
@click.option(
    "--deep-timeout",
    type=click.IntRange(min=1),
    default=PATIENCE,
    show_default=True,
    metavar="SECONDS",
    help="How long that job may wait in the queue.",
)
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def doctor(profile: str, deep: bool, deep_timeout: int, as_json: bool) -> int:
    """Look at what a profile needs: Slurm, partitions, accounts, containers, folders, credentials.

    Starts no job without --deep, and shows no credential. Exit code 1 when something would not work.
    With --deep each node's GPUs, Python, torch, speed to the shared folder and clock, and a sum over all of them; what
    would not do is left out of the suggested profile. Ctrl-C withdraws the job.
    """
    found = lifecycle.examine(profile, deep_timeout if deep else None)
    if as_json:
        click.echo(json.dumps({"profile": profile, **asdict(found)}, indent=2))
    else:
        click.echo(table(("", "WHAT", "FOUND"), [(_MARKS[f.state], f.topic, f.text) for f in found.findings]))
        if found.suggestion:
            click.echo(f"\na profile that would fit (env.toml):\n\n[{profile}]")
            for key, value in found.suggestion.items():
                click.echo(f"{key} = {_toml(value)}")
    return 1 if any(f.state == "problem" for f in found.findings) else 0


def _toml(value: Any) -> str:
    """Numbers, and text and lists of text without control characters: JSON's form of these is TOML's as well."""
    return json.dumps(value, ensure_ascii=False)
