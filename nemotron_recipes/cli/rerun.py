"""`nemotron rerun RUN`."""

from __future__ import annotations

import json

import click

from nemotron_recipes.artifacts.records import find_run
from nemotron_recipes.cli.stage import carry_out
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import printable


@click.command("rerun")
@click.argument("run")
@click.option("-d", "--dry-run", is_flag=True, help="Show exactly what would run; write and start nothing.")
@click.option("--skip-preflight", is_flag=True, help="Submit without asking first whether it can run.")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def rerun(run: str, dry_run: bool, skip_preflight: bool, as_json: bool) -> int:
    """Make the plan of RUN once more, as a new run: the same config, inputs and code. Says what is different today."""
    from nemotron_recipes import lifecycle
    from nemotron_recipes.cli import plan_text

    prepared, different = lifecycle.prepare_again(find_run(read_environment().output / "runs", run))
    if dry_run and as_json:
        tree = json.loads(lifecycle.rendered_json(prepared))
        click.echo(json.dumps({**tree, "different": different}, indent=2, ensure_ascii=False))
        return 0
    for line in different:
        click.echo(printable(f"note: {line}"), err=True)
    if dry_run:
        click.echo(plan_text.describe(prepared))
        return 0
    return carry_out(prepared, as_json, preflight=not skip_preflight)
