"""`nemotron FAMILY STAGE key=a,b --multirun`: show a sweep, submit it, follow it."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from nemotron_recipes import lifecycle, sweep
from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.cli import plan_text, summary
from nemotron_recipes.cli.attach import INTERRUPTED, asked_again, stop_signals
from nemotron_recipes.cli.text import table
from nemotron_recipes.errors import NemotronError, printable
from nemotron_recipes.spec import JobHandle, Request

LOOK_SECONDS = 1.0


def carry_out(request: Request, options: dict[str, Any]) -> int:
    """What was asked of a sweep; the exit code: 0 all succeeded (or were submitted), 1 one has failed, 130 stopped."""
    as_json = options["as_json"]
    found = sweep.prepare(request, options["max_parallel"], bool(options["force"]))
    if options["dry_run"]:
        click.echo(_as_json(found) if as_json else _described(found))
        return 0
    if not as_json:
        click.echo(printable(_table(found)))
    handles = sweep.submit(found, not options["skip_preflight"], plan_text.tell)
    click.echo("".join(map(plan_text.note, handles)), err=True, nl=False)
    detached = request.mode == "batch"
    if detached and not options["wait"]:
        tree = {"sweep": found.id, "runs": [{"run": member.run, "values": member.values} for member in found.members]}
        click.echo(json.dumps(tree) if as_json else printable(_how_to_go_on(found)))
        return 0
    return _follow(found, handles, as_json, quiet=detached)


def _follow(found: sweep.Sweep, handles: list[JobHandle], as_json: bool, quiet: bool) -> int:
    """Until all are over. Ctrl-C stops runs on this machine; those that a scheduler carries go on, until it is pressed
    once more."""
    folders = [Path(member.run_dir) for member in found.members]
    try:
        with stop_signals():
            views = _watched(found, folders, quiet=as_json or quiet)
    except KeyboardInterrupt as reason:
        left = [view.handle for view in lifecycle.load_all(folders) if view.handle and view.state in sweep.GOES_ON]
        left = [handle for handle in left if lifecycle.detaches(handle)]
        if left and not asked_again(reason, found.id, "nemotron runs watch, or the same command"):
            return INTERRUPTED
        with suppress(OSError):
            click.echo("\nstopping the runs ...", err=True)
        for handle in left or reversed(handles):  # those that wait first
            lifecycle.cancel(handle)
        return INTERRUPTED
    ended = [views[member.run] for member in found.members if member.run in views]
    if as_json:
        click.echo(json.dumps({"sweep": found.id, "runs": [summary.as_tree(view) for view in ended]}, indent=2))
    else:
        click.echo(printable(f"\n{_ends(ended)}\ncompare      nemotron runs compare {found.id}"))
    if all(view.state == "succeeded" for view in ended):
        return 0
    return INTERRUPTED if all(view.state in ("succeeded", "cancelled") for view in ended) else 1


def _watched(found: sweep.Sweep, folders: list[Path], quiet: bool) -> dict[str, RunView]:
    """Say what has changed until no run goes on; the runs by name."""
    said: dict[str, str] = {}
    began = time.monotonic()
    ended = False
    while True:
        views = {view.id: view for view in lifecycle.load_all(folders)}
        for member in found.members:
            view = views.get(member.run)
            if view is not None and said.get(view.id) != view.state:
                said[view.id] = view.state
                if not quiet:
                    click.echo(printable(f"{view.state:<10} {' '.join(member.values)}  {view.id}"))
        if not any(view.state in sweep.GOES_ON for view in views.values()):
            if ended:
                return views
            ended = all(_has_ended(views[member.run]) for member in found.left if member.run in views)
            if ended:
                continue  # how it has ended may differ from what was known before
        most = max([lifecycle.ask_seconds(view.handle) for view in views.values() if view.handle], default=0.0)
        time.sleep(max(LOOK_SECONDS, min(most, (time.monotonic() - began) / 10)))


def _has_ended(view: RunView) -> bool:
    """Whether nobody is at work on it any more: a stage's record comes before its processes and containers have ended,
    and how they do counts too. Of a machine that can't be asked the record is all there is."""
    if view.handle is None or view.state != "succeeded":
        return True
    try:
        return lifecycle.liveness(view.handle) not in ("queued", "running")
    except NemotronError:
        return True


def _ends(views: list[RunView]) -> str:
    counts = {state: sum(view.state == state for view in views) for state in dict.fromkeys(v.state for v in views)}
    lines = [", ".join(f"{number} {state}" for state, number in counts.items()) or "nothing had to run"]
    return "\n".join([*lines, *(f"why          nemotron runs explain {v.id}" for v in views if v.state == "failed")])


def _table(found: sweep.Sweep) -> str:
    side = f", {found.at_once} side by side" if found.at_once else ""
    rows = [(number, " ".join(m.values), m.run, _standing(m)) for number, m in enumerate(found.members, 1)]
    head = f"Sweep {found.id}: {len(found.members)} runs{side}; {len(found.left)} to submit"
    return f"{head}\n{table(('', 'VALUES', 'RUN', 'STATE'), rows)}"


def _standing(member: sweep.Member) -> str:
    if member.prepared is not None:
        return "next attempt" if member.view else "new"
    return member.view.state if member.view else "reused: it has been made already"


def _described(found: sweep.Sweep) -> str:
    parts = [printable(_table(found))]
    for number, member in enumerate(found.members, 1):
        if member.prepared is not None:
            parts.append(f"\nRun {number}/{len(found.members)}: {printable(' '.join(member.values))}")
            parts.append(plan_text.describe(member.prepared))
    return "\n".join(parts)


def _as_json(found: sweep.Sweep) -> str:
    runs = [
        {
            "run": member.run,
            "values": list(member.values),
            "state": _standing(member),
            **(json.loads(lifecycle.rendered_json(member.prepared)) if member.prepared else {}),
        }
        for member in found.members
    ]
    return json.dumps({"sweep": found.id, "at_once": found.at_once, "runs": runs}, indent=2, ensure_ascii=False)


def _how_to_go_on(found: sweep.Sweep) -> str:
    return "\n".join(
        (
            f"submitted {len(found.left)} runs",
            "  state    nemotron runs list",
            f"  compare  nemotron runs compare {found.id}",
            f"  stop     nemotron runs cancel {found.id}",
        )
    )
