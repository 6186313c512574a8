"""`nemotron <family> <stage>`: commands made from the folders below `conf/recipe/<family>`, and `nemotron apply`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from nemotron_recipes.config.catalog import Catalog
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.planning.smoke import LEAST
from nemotron_recipes.spec import Request


class WordGroup(click.Group):
    """A family, or a word between a family and its stages (`data`, `prep`)."""

    def __init__(self, catalog: Catalog, config_dirs: tuple[str, ...], path: tuple[str, ...]):
        super().__init__(path[-1], help=f"Stages of {' '.join(path)}.")
        self.catalog, self.config_dirs, self.path = catalog, config_dirs, path

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.catalog.words(*self.path))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        path = (*self.path, name)
        if self.catalog.configs(*path):
            return stage_command(self.catalog, self.config_dirs, path)
        return WordGroup(self.catalog, self.config_dirs, path) if self.catalog.words(*path) else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            valid = self.list_commands(ctx)
            what = "option" if args[0].startswith("-") else f"stage of {' '.join(self.path)}"
            raise UserError(Problem(f"unknown {what} '{args[0]}'", fix=nearest(args[0], valid)))
        path = (*self.path, *args[:1])
        if args[1:] and args[1] in self.catalog.words(*path):  # a stage's folder may hold further stages
            return args[0], WordGroup(self.catalog, self.config_dirs, path), args[1:]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows, example = [], ""
        for words in self.catalog.stages(self.path[0]):
            if words[: len(self.path) - 1] == self.path[1:]:
                configs = self.catalog.configs(self.path[0], *words)
                rows.append((" ".join(words[len(self.path) - 1 :]), f"configs: {', '.join(configs)}"))
                example = f"nemotron {' '.join((self.path[0], *words))}"
        with formatter.section("Stages"):
            formatter.write_dl(rows)
        with formatter.section("Profiles (env.toml)"):
            formatter.write_text(profile_names())
        with formatter.section("Examples"):
            formatter.write_text(f"{example} --help")
            formatter.write_text(f"{example} -c {_example(configs)} --dry-run")


class StageCommand(click.Command):
    """A stage; its help lists what can be chosen."""

    catalog: Catalog
    path: tuple[str, ...]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        configs = self.catalog.configs(*self.path)
        prepares, is_pipe, converts = self.path[1] == "data", self.path[-1] == "pipe", "convert" in self.path
        rows = [("configs (-c)", ", ".join(configs)), ("profiles (-r, -b)", profile_names())]
        if not prepares and not is_pipe:
            groups = self.catalog.groups
            rows += [(f"{g}=", ", ".join(groups[g])) for g in groups if g == "model" or not converts]
        with formatter.section("Choices"):
            formatter.write_dl(rows)
        override = "sft.train.train_iters=100" if is_pipe else "'outputs.model=my-model'"
        if converts:
            override = "model.path=/models/mine"
        if prepares:
            override = "'data.sources=[{path: my-chats.jsonl}]'"
        command = f"nemotron {' '.join(self.path)} -c {_example(configs)}"
        with formatter.section("Examples"):
            for rest in ("--dry-run", override, f"--batch {next(iter(_profiles() or ()), 'PROFILE')}"):
                formatter.write_text(f"{command} {rest}")


def _example(configs: tuple[str, ...]) -> str:
    return "tiny" if "tiny" in configs else configs[-1]


def profile_names() -> str:
    """The profiles of env.toml for a help page, which must show even where that file has mistakes."""
    names = _profiles()
    if names is None:
        return "env.toml has mistakes: nemotron env list names them"
    return ", ".join(names) or "none: add one to env.toml"


def _profiles() -> tuple[str, ...] | None:
    """Names of the profiles; None where env.toml has mistakes."""
    from nemotron_recipes.config.profiles import read_environment

    try:
        return tuple(read_environment().profiles)
    except UserError:
        return None


def stage_command(catalog: Catalog, config_dirs: tuple[str, ...], path: tuple[str, ...]) -> StageCommand:
    """The command of `recipe/<path>`; `--sample` where data is prepared, `--force` where results are reused."""
    prepares, converts = path[1:2] == ("data",), "convert" in path
    has_default = "default" in catalog.configs(*path)
    config_help = "Config to use  " + ("[default: default]" if has_default else "[required]")
    params: list[click.Parameter] = [
        click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE]..."),
        click.Option(["-c", "--config"], default="default", metavar="NAME", help=config_help),
        click.Option(["-r", "--run"], metavar="PROFILE", help="Run where a profile says, and follow it."),
        click.Option(["-b", "--batch"], metavar="PROFILE", help="Submit where a profile says, and detach."),
        click.Option(["--wait"], is_flag=True, help="With --batch: wait for the end without a word."),
        click.Option(["--all-ranks"], is_flag=True, help="Show every rank's log, each line tagged."),
        click.Option(["--skip-preflight"], is_flag=True, help="Submit without asking first whether it can run."),
        click.Option(["-d", "--dry-run"], is_flag=True, help="Show exactly what would run; write and start nothing."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print for programs."),
        click.Option(["--offline"], is_flag=True, help="Never ask the network; unpinned inputs show as UNPINNED."),
        click.Option(["--plan-out"], metavar="FILE", help="Save the plan for `nemotron apply`; run nothing."),
        click.Option(
            ["-m", "--multirun"], is_flag=True, help="A run for each of several values: KEY=A,B KEY=range(3)."
        ),
        click.Option(
            ["--max-parallel"],
            type=click.IntRange(min=1),
            metavar="N",
            help="With --multirun: at most N runs side by side  [default: 1 on a machine, all on a scheduler]",
        ),
        click.Option(["--config-dir"], metavar="DIR", help="Your own conf/ (repeatable)."),
    ]
    if not prepares and not converts and path[-1] != "pipe":
        short = "Only the first N steps, with saves: projects the whole run's time."
        params.append(click.Option(["--smoke"], type=click.IntRange(min=LEAST), metavar="N", help=short))
    if prepares:
        params.append(
            click.Option(["--sample"], type=click.IntRange(min=1), metavar="N", help="At most N rows a source.")
        )
    made_once = prepares or converts or path[-1] == "pipe"
    force = "Make everything anew; reuse no earlier result." if made_once else "With --multirun: a sweep of its own."
    params.append(click.Option(["--force"], is_flag=True, help=force))

    def run(**options: Any) -> int:
        return _run(_request(config_dirs, path, options, made_once), options)

    title = "Run the whole pipe" if path[-1] == "pipe" else f"Run stage '{' '.join(path[1:])}'"
    command = StageCommand(path[-1], params=params, callback=run, help=f"{title} of {path[0]}.")
    command.catalog, command.path = catalog, path
    return command


def _request(config_dirs: tuple[str, ...], path: tuple[str, ...], options: dict[str, Any], made_once: bool) -> Request:
    run, batch = options["run"], options["batch"]
    problems = [
        Problem(f"{flag} needs a {what.lower()}, not {value!r}", "command line", f"{flag} {what}")
        for flag, what, value in (
            ("--run", "PROFILE", run),
            ("--batch", "PROFILE", batch),
            ("--config", "NAME", options["config"]),
            ("--plan-out", "FILE", options["plan_out"]),
        )
        # an empty one comes from a shell variable that isn't set: it must never mean "here" or "now"
        if value is not None and (not value or value.startswith("-") or ("=" in value and what != "FILE"))
    ]
    if run is not None and batch is not None:
        problems.append(Problem("--run and --batch exclude each other", "command line", "follow it, or detach"))
    if options["wait"] and batch is None:
        problems.append(Problem("--wait goes with --batch; --run waits and shows", "command line", "--batch PROFILE"))
    if options["all_ranks"] and batch is not None:
        fix = "nemotron runs logs -f --all-ranks RUN"
        problems.append(Problem("--all-ranks is for a run that is followed", "command line", fix))
    problems += _sweep_problems(options, made_once)
    if problems:
        raise UserError(*problems)
    overrides = options["overrides"]
    if options.get("sample"):
        overrides = (*overrides, f"data.sample={options['sample']}")
    return Request(
        family=path[0],
        words=path[1:],
        config=options["config"],
        mode="batch" if batch is not None else "run" if run is not None else "here",
        profile=run if run is not None else batch,
        overrides=tuple(overrides),
        config_dirs=config_dirs,
        force=bool(options.get("force")),
        offline=options["offline"],
        cwd=os.getcwd(),
        smoke=options.get("smoke") or 0,
    )


def _sweep_problems(options: dict[str, Any], made_once: bool) -> list[Problem]:
    if options["multirun"]:
        return [
            Problem(f"{flag} is for one run, --multirun makes several", "command line", "leave one of them out")
            for flag in ("--plan-out", "--all-ranks")
            if options[flag.strip("-").replace("-", "_")]
        ]
    problems = []
    if options["max_parallel"]:
        problems.append(Problem("--max-parallel goes with --multirun", "command line", "add --multirun"))
    if options["force"] and not made_once:
        what = "--force goes with --multirun here: a single training run reuses no earlier result"
        problems.append(Problem(what, "command line", "leave it out"))
    return problems


def _run(request: Request, options: dict[str, Any]) -> int:
    from nemotron_recipes import lifecycle
    from nemotron_recipes.cli import plan_text

    if options["multirun"]:
        from nemotron_recipes.cli import sweep

        return sweep.carry_out(request, options)
    prepared = lifecycle.prepare(request)
    if options["dry_run"] or options["plan_out"]:
        if options["plan_out"]:
            lifecycle.save_plan(prepared, Path(options["plan_out"]))
        click.echo(lifecycle.rendered_json(prepared) if options["as_json"] else plan_text.describe(prepared))
        if options["plan_out"] and not options["as_json"]:
            click.echo(f"saved; run it with: nemotron apply {options['plan_out']}")
        return 0
    return carry_out(prepared, options["as_json"], options["wait"], options["all_ranks"], not options["skip_preflight"])


def carry_out(prepared: Any, as_json: bool, wait: bool = False, all_ranks: bool = False, preflight: bool = True) -> int:
    """Submit, then follow, or detach (`--batch`), or wait without a word for the end (`wait`); the exit code."""
    from nemotron_recipes import lifecycle
    from nemotron_recipes.cli import attach, plan_text

    if prepared.done:
        click.echo(plan_text.nothing_to_do(prepared, as_json))
        return 0
    handle = lifecycle.submit(prepared, preflight, plan_text.tell)
    click.echo(plan_text.note(handle), err=True, nl=False)
    detach = prepared.plan.request.mode == "batch"
    if detach and not (wait and as_json):  # programs get one document: the end
        click.echo(plan_text.submitted(handle, as_json))
    if detach and not wait:
        return 0
    return attach.attached(handle, as_json, all_ranks, quiet=detach)


@click.command("apply")
@click.argument("plan", type=click.Path(dir_okay=False, path_type=Path), metavar="PLAN.json")
@click.option("-d", "--dry-run", is_flag=True, help="Check that the plan still holds and show it.")
@click.option("--skip-preflight", is_flag=True, help="Submit without asking first whether it can run.")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def apply_command(plan: Path, dry_run: bool, skip_preflight: bool, as_json: bool) -> int:
    """Run exactly a plan saved with --plan-out; refuse when an input, the code or the config has moved since."""
    from nemotron_recipes import lifecycle
    from nemotron_recipes.cli import plan_text

    prepared = lifecycle.reprepare(lifecycle.load_plan(plan))
    if dry_run:
        click.echo(lifecycle.rendered_json(prepared) if as_json else plan_text.describe(prepared))
        return 0
    return carry_out(prepared, as_json, preflight=not skip_preflight)
