"""`nemotron gc`: find what can go, put it into quarantine, delete what has lain there long enough."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import click

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts import gc as collector
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.cli.text import size, table
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError, printable

DAY = 24 * 3600.0


@click.command()
@click.option("-d", "--dry-run", is_flag=True, help="Show what can go; touch nothing.")
@click.option("--keep", type=click.IntRange(min=1), default=3, show_default=True, help="Newest versions of a name.")
@click.option("--older-than", metavar="DAYS", type=click.FloatRange(min=0), default=30, show_default=True)
@click.option("--quarantine-days", metavar="DAYS", type=click.FloatRange(min=0), default=7, show_default=True)
@click.option("--restore", metavar="WHAT", help="Bring something back from quarantine, e.g. NAME:v3.")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def gc(dry_run: bool, keep: int, older_than: float, quarantine_days: float, restore: str | None, as_json: bool) -> int:
    """Move unreferenced versions and old checkpoints into quarantine, and delete what has been there long enough.

    Never goes: what has an alias, the newest versions, what a run that goes on reads, and whatever a kept version
    descends from. Runs of other output folders on the same store are only protected by --older-than.
    """
    environment = read_environment()
    store = Store(environment.store)
    if restore is not None:
        if dry_run:
            raise UserError(Problem("--restore and --dry-run exclude each other", "command line"))
        click.echo(printable(f"restored: {collector.restore(store.root, restore).path}"))
        return 0
    now = time.time()
    runs = lifecycle.newest_runs(environment.output / "runs", None)
    found, kept = collector.find(store, runs, collector.Policy(keep, older_than * DAY), now)
    gone: list[str] = []
    left: list[collector.Left] = []
    if not dry_run:
        found, unmoved = collector.quarantine(store.root, found, now)
        gone, undeleted = collector.purge(store.root, now - quarantine_days * DAY, kept)
        left = [*unmoved, *undeleted]
    if as_json:
        tree = {"items": [asdict(item) for item in found], "deleted": gone, "left": [asdict(each) for each in left]}
        click.echo(json.dumps(tree, indent=2))
        return 1 if left else 0
    total = sum(item.size for item in found)
    if found:
        click.echo(table(("WHAT", "SIZE", "WHY"), [(item.what, size(item.size), item.why) for item in found]))
    verb = "can go" if dry_run else f"in quarantine now ({store.root / '.quarantine'})"
    click.echo(printable(f"{len(found)} things, {size(total)} {verb}"))
    if gone:
        click.echo(printable(f"deleted from quarantine: {', '.join(gone)}"))
    for each in left:
        click.echo(printable(f"stays: {each.what}: {each.why}"), err=True)
    return 1 if left else 0
