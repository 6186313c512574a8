"""From a request to a plan and the bytes that it renders to: reads only. This is all that `--dry-run` does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nemotron_recipes.config.catalog import Catalog, config_roots
from nemotron_recipes.config.profiles import Environment, read_environment
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors import get_executor
from nemotron_recipes.executors.remote import sites, transport
from nemotron_recipes.lifecycle.reach import speaking_to
from nemotron_recipes.rundir import RunDir, write_sealed
from nemotron_recipes.seals import opened
from nemotron_recipes.spec import Plan, Rendered, Request, Tree, to_json


@dataclass(frozen=True)
class Prepared:
    """A plan and the bytes it renders to; nothing has happened yet."""

    plan: Plan
    rendered: Rendered
    code: Path | None = None  # the package to take along; None: the one that is running
    home: Path | None = None  # where this machine keeps what it knows of a run whose folder is elsewhere

    @property
    def executor(self) -> str:
        return self.plan.stages[0].placement.executor

    @property
    def done(self) -> bool:
        """Nothing is left to run: every stage's output is in the store already."""
        return not self.rendered.stages


def prepare(request: Request, environment: Environment | None = None) -> Prepared:
    """Compose, resolve, plan, validate and render. UserError carries every problem; nothing is written."""
    with site_of(request.profile, environment or read_environment(Path(request.cwd))) as (site, homes):
        made = plan(request, site)
        return rendered(made, homes / made.id if homes else None)


@contextmanager
def site_of(profile: str | None, environment: Environment) -> Iterator[tuple[Environment, Path | None]]:
    """Speak to a profile's machine: (env.toml as it holds there, where this machine keeps what it knows of the runs
    there; None: they lie here). UserError: the profile has mistakes, or the machine can't be reached.
    """
    complete = checked_profile(environment, profile) if profile else {}
    with speaking_to(sites.of_profile(complete)) as where:
        if where.name:
            folder = complete["remote_job_dir"].rstrip("/")
            far = replace(environment, artifacts={"output": folder, "store": f"{folder}/store"})
            yield far, environment.output / "runs"
        else:
            yield environment, None


def plan(request: Request, environment: Environment | None = None) -> Plan:
    """The plan of what runs on this machine's own cluster, or on the one that is spoken to; on no other one."""
    from nemotron_recipes.planning.plan import make_plan

    _refuse_other_encodings(request)
    cwd = Path(request.cwd)
    environment = environment or read_environment(cwd)
    catalog = Catalog(config_roots(request.config_dirs, cwd))
    made = make_plan(request, catalog, environment)
    _refuse_other_site(made, checked_profile(environment, request.profile) if request.profile else {})
    return made


def rendered(plan: Plan, home: Path | None = None) -> Prepared:
    """A plan and what its executor makes of it."""
    return Prepared(plan, get_executor(plan.stages[0].placement.executor).render(plan), home=home)


def rendered_json(prepared: Prepared) -> str:
    """Plan and rendered bytes as one JSON document: what `--dry-run --json` prints."""
    return json.dumps(
        {"plan": json.loads(to_json(prepared.plan)), "rendered": json.loads(to_json(prepared.rendered))},
        indent=2,
        sort_keys=True,
        ensure_ascii=False,
    )


def checked_profile(environment: Environment, name: str) -> Tree:
    """A profile of env.toml, complete. UserError: there is none, or it has mistakes."""
    from nemotron_recipes.planning.validate import check_run

    complete, problems = check_run(environment.profile(name), lambda key: f"profile [{name}]")
    problems = problems or sites.problems(complete, f"profile [{name}]")
    if problems:
        raise UserError(*problems)
    return complete


def save_plan(prepared: Prepared, path: Path) -> None:
    """Write a plan for `apply`."""
    try:
        write_sealed(path, asdict(prepared.plan), kind="plan")
    except OSError as error:
        raise UserError(Problem(f"--plan-out {path}: {error.strerror}")) from None


def load_plan(path: Path) -> Plan:
    """A plan that `save_plan` or a run folder holds. UserError when it isn't one."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Plan).validate_python(opened(json.loads(path.read_bytes())))
    except OSError as error:
        raise UserError(Problem(f"plan {path} can't be read: {error.strerror}")) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        what = f"{path} is not a plan: {key + ': ' if key else ''}{first['msg']}"
        raise UserError(Problem(what, fix="make one with --plan-out FILE")) from None
    except ValueError as error:  # no JSON, or its seal does not fit
        raise UserError(Problem(f"{path} is not a plan: {error}", fix="make one with --plan-out FILE")) from None


def reprepare(saved: Plan) -> Prepared:
    """Check that a saved plan still holds, and render it. UserError names everything that has moved since."""
    from nemotron_recipes.planning.moved import moved

    now = prepare(saved.request)
    found = moved(saved, now.plan)
    if found:
        fix = "look at what changed, then make the plan again with --plan-out"
        raise UserError(*(Problem(f"the plan no longer holds: {what}", fix=fix) for what in found))
    home = now.home.with_name(saved.id) if now.home else None
    with transport.through(sites.of_profile(saved.stages[0].placement.options)):
        return Prepared(saved, get_executor(saved.stages[0].placement.executor).render(saved), home=home)


def prepare_again(run_dir: Path) -> tuple[Prepared, list[str]]:
    """(a run's plan once more, as a new run; what is different today). UserError: it can't be the same."""
    from pydantic import TypeAdapter

    from nemotron_recipes.planning import again
    from nemotron_recipes.planning.code import snapshot_of

    saved = load_plan(RunDir(run_dir).plan)
    with speaking_to(sites.of_profile(saved.stages[0].placement.options)) as where:
        again.check_same(saved, run_dir)
        tree = again.renewed(saved, json.loads(to_json(saved)))
        plan = again.with_own_path(TypeAdapter(Plan).validate_python(tree))
        executor = get_executor(plan.stages[0].placement.executor)
        problems = [problem for stage in plan.stages for problem in executor.check(stage)]
        if problems:
            raise UserError(*problems)
        home = run_dir.with_name(plan.id) if where.name else None
        different = [*again.differences_now(saved), *_profile_today(saved)]
        return Prepared(plan, executor.render(plan), snapshot_of(run_dir), home), different


def _profile_today(saved: Plan) -> list[str]:
    """How the profile that a run was placed by differs from what env.toml says here and now, in words."""
    from nemotron_recipes.planning import again

    name = saved.request.profile
    if name is None:
        return []
    try:
        environment = read_environment()
        said, complete = environment.profile(name), checked_profile(environment, name)
    except UserError as error:
        return [f"profile {name} can't be used today: {error.problems[0].what}; the rerun runs where the run did"]
    return again.profile_differences(saved, {key: complete.get(key) for key in said})


def _refuse_other_site(plan: Plan, profile: Tree) -> None:
    """The plan was made with what the profile's machine has: no override may send it to another one."""
    for stage in plan.stages:
        options = stage.placement.options
        if not (sites.login_of(options) or sites.login_of(profile)):
            continue
        for key in ("tunnel", "host", "user", "identity", "remote_job_dir", "remote_python", "ssh_config"):
            if options.get(key) != profile.get(key):
                what = f"run.{key} on the command line is not what the profile says"
                raise UserError(Problem(what, f"stage {stage.name}", "make it a profile of its own in env.toml"))


def _refuse_other_encodings(request: Request) -> None:
    """A plan is UTF-8 text; a folder whose name is not could not be written down in it."""
    problems = [
        Problem(f"the {what} {name!r} is not valid UTF-8", "command line", "rename it in UTF-8")
        for what, names in (("current folder", (request.cwd,)), ("--config-dir", request.config_dirs))
        for name in names
        if any("\ud800" <= letter <= "\udfff" for letter in name)
    ]
    if problems:
        raise UserError(*problems)
