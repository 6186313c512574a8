"""Entry point: `nemotron`. Thin: parses, calls the lifecycle, turns errors into messages and exit codes.

Families and stages are the folders below `conf/recipe`; click commands are made from them when they are asked for, so
nothing heavy is imported for `--help`.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import sys
from contextlib import suppress
from typing import Any

import click

from nemotron_recipes import __version__
from nemotron_recipes.cli import reach
from nemotron_recipes.cli.stage import WordGroup, profile_names
from nemotron_recipes.config.catalog import Catalog, config_roots
from nemotron_recipes.errors import NemotronError, Problem, UserError, nearest, printable

EXAMPLES = """\b
Examples:
  nemotron nano3 pipe -c tiny                  the whole pipeline, on this machine
  nemotron nano3 sft -c tiny --dry-run         exactly what would run
  nemotron nano3 sft -c tiny optimizer.lr=1e-3 any value overridden
  nemotron runs list                           what ran
  nemotron lineage nano3-tiny-rl               which data made which model
"""
FIXED = {
    "apply": "nemotron_recipes.cli.stage:apply_command",
    "plan": "nemotron_recipes.cli.plan:plan",
    "rerun": "nemotron_recipes.cli.rerun:rerun",
    "runs": "nemotron_recipes.cli.runs:runs",
    "data": "nemotron_recipes.cli.data:data",
    "artifacts": "nemotron_recipes.cli.artifacts:artifacts",
    "lineage": "nemotron_recipes.cli.artifacts:lineage",
    "report": "nemotron_recipes.cli.report:report",
    "gc": "nemotron_recipes.cli.gc:gc",
    "models": "nemotron_recipes.cli.models:models",
    "images": "nemotron_recipes.cli.images:images",
    "env": "nemotron_recipes.cli.environment:env",
    "doctor": "nemotron_recipes.cli.doctor:doctor",
}
HELP = {
    "apply": "Run exactly a plan saved with --plan-out.",
    "plan": "List layouts of a model on so many GPUs that fit.",
    "rerun": "Run exactly the plan of an earlier run once more.",
    "runs": "List, show, follow, compare and cancel runs.",
    "data": "Look at prepared data, and make rows from logs.",
    "artifacts": "List and show what the store holds.",
    "lineage": "Draw what a model or data set came from.",
    "report": "Write what is known of a model, or what changed between two versions.",
    "gc": "Put into quarantine what nothing kept descends from.",
    "models": "Fetch weights and data sets before a job asks for them.",
    "images": "List, check and import the images that stages run in.",
    "env": "Show the profiles of env.toml.",
    "doctor": "Look at what a profile's machine or cluster can do.",
}
LOOKS = {("lineage",), ("report",), ("gc",), ("env",), ("data", "show"), ("plan", "layouts")} | {
    *(("artifacts", word) for word in ("list", "show", "alias")),
    *(("runs", word) for word in ("list", "show", "logs", "explain", "diff", "compare", "tensorboard")),
}
# A folder may not be written, or can't be: nothing that a traceback would explain.
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
WITH_VALUE = "bcnopr"  # short options that take the rest of their word as a value


class ReaderGone(Exception):
    """Whoever read the output (head, less) has gone."""


class Root(click.Group):
    """Fixed commands, and one per family that the config roots hold."""

    def __init__(self, catalog: Catalog, config_dirs: tuple[str, ...]):
        super().__init__("nemotron", help="Fine-tune NVIDIA's Nemotron models: data prep, SFT, DPO/RL, with lineage.")
        self.catalog = catalog
        self.config_dirs = config_dirs
        self.params += [_config_dir_option(), _version_option()]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.catalog.families, *FIXED]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in FIXED:
            from importlib import import_module

            module, _, attribute = FIXED[name].partition(":")
            command: click.Command = getattr(import_module(module), attribute)
            return command
        if name in self.catalog.families:
            return WordGroup(self.catalog, self.config_dirs, (name,))
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            kind = "option" if args[0].startswith("-") else "command or family"
            raise UserError(Problem(f"unknown {kind} '{args[0]}'", fix=nearest(args[0], self.list_commands(ctx))))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would end with 1, as if a job had failed
            raise ReaderGone from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Families (conf/recipe)"):
            formatter.write_dl(
                [(f, ", ".join(" ".join(s) for s in self.catalog.stages(f))) for f in self.catalog.families]
            )
        with formatter.section("Commands"):
            formatter.write_dl(list(HELP.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Profiles (env.toml)"):
            formatter.write_text(profile_names())
        formatter.write_paragraph()
        formatter.write(EXAMPLES.replace("\b\n", ""))


def main(argv: list[str] | None = None) -> None:
    """Run a command line; exits 0 done, 1 the job failed, 2 the request is wrong, 130 cancelled."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_current_folder()
        arguments, config_dirs = take_config_dirs(arguments)
        root = Root(Catalog(config_roots(config_dirs)), config_dirs)
        if arguments and not {"--help", "--version"} & set(arguments):
            reach.check()
            if argv is None and only_looks(arguments):
                reach.guard()
                gc.disable()  # it is over soon; going through 10,000 manifests again and again takes time
            elif argv is None:
                reach.guard(acts=True)
        code = root.main(arguments, prog_name="nemotron", standalone_mode=False)
        _mirror_in_background(arguments)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        usage = error.ctx.get_usage() + "\n" if isinstance(error, click.UsageError) and error.ctx else ""
        click.echo(f"{usage}error: {error.format_message()}", err=True)
        sys.exit(2)
    except UserError as error:
        for problem in error.problems:
            click.echo(f"error: {printable(str(problem))}", err=True)
        sys.exit(error.exit_code)
    except NemotronError as error:
        click.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        click.echo(f"error: {printable(f'{error.filename}: {error.strerror}')}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        sys.exit(130)
    except ReaderGone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _mirror_in_background(arguments: list[str]) -> None:
    """After a command: replay what W&B doesn't know yet, in a process that nobody waits for."""
    if {"--help", "--version", "sync"} & set(arguments) or _has(arguments, "--dry-run", "d"):
        return
    from nemotron_recipes.config.profiles import read_environment
    from nemotron_recipes.mirror import sync

    with suppress(OSError, UserError):  # the command itself is done, and `artifacts sync` says what is wrong
        sync.in_background(read_environment().output)


def only_looks(arguments: list[str]) -> bool:
    """Whether a command may be ended in the middle and nothing is lost: it submits, follows and stops nothing."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments  # the rest is another program's
    words = [word for word in own if not word.startswith("-")]
    if _has(own, "--dry-run", "d"):
        return True
    if _has(own, "--follow", "f"):
        return False
    return tuple(words[:1]) in LOOKS or tuple(words[:2]) in LOOKS


def _has(arguments: list[str], long: str, short: str) -> bool:
    """Whether a switch is among them, also in one word with others: `-md`, `-dr PROFILE`. In `-cd` it is a name."""
    bundles = (word[1:] for word in arguments if word.startswith("-") and not word.startswith("--"))
    return long in arguments or any(short in re.split(f"[{WITH_VALUE}]", bundle)[0] for bundle in bundles)


def take_config_dirs(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Take every `--config-dir DIR` out of the arguments: families must be known before the rest can be parsed."""
    left: list[str] = []
    taken: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config-dir":
            taken.append(next(rest, ""))
        elif argument.startswith("--config-dir="):
            taken.append(argument.partition("=")[2])
        else:
            left.append(argument)
    if any(not folder or folder.startswith("-") for folder in taken):
        raise UserError(Problem("--config-dir needs a folder", "command line", "--config-dir DIR"))
    return left, tuple(taken)


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(Problem("the current folder does not exist any more", fix="cd to another one")) from None


def _version_option() -> click.Option:
    def show(ctx: click.Context, option: click.Parameter, given: bool) -> None:
        if given:
            click.echo(f"nemotron-recipes {__version__}")
            ctx.exit()

    return click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version and exit."
    )


def _config_dir_option() -> click.Option:
    return click.Option(["--config-dir"], metavar="DIR", help="Your own conf/ (anywhere on the line; repeatable).")
