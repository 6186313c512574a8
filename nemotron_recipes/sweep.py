"""A sweep: one run for each combination of values, all submitted at once; whatever orders them needs nobody alive.

`prepare` reads only. A sweep is known by what its runs compute, so the same command again finds it and continues it:
`<output>/sweeps/<id>.json` says which run stands for which combination, and is on disk before the first is submitted.
"""

from __future__ import annotations

import fcntl
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.config.catalog import Catalog, config_roots
from nemotron_recipes.config.profiles import Environment, read_environment
from nemotron_recipes.errors import Cancelled, JobFailed, NemotronError, Problem, UserError
from nemotron_recipes.executors import get_executor
from nemotron_recipes.lifecycle import Prepared
from nemotron_recipes.rundir import RunDir, read_json, write_sealed
from nemotron_recipes.spec import JobHandle, Plan, Request, sha256_text, to_json

Values = frozenset[str]  # the overrides that the sweep has set for a run
GOES_ON = ("pending", "running", "stalled")


@dataclass(frozen=True)
class Member:
    """One run of a sweep. `view`: how it stands, where it was submitted before; `prepared`: what is to be submitted."""

    values: tuple[str, ...]  # the overrides that the sweep has set
    run: str
    run_dir: str  # on this machine
    prepared: Prepared | None = None
    view: RunView | None = None


@dataclass(frozen=True)
class Sweep:
    """All runs, in the order of the command line. at_once: how many of them go on side by side; None: all."""

    id: str
    title: str
    output: Path
    members: tuple[Member, ...]
    at_once: int | None
    noted: Mapping[Values, Path]  # the runs of an earlier submission of it
    anew: bool = False  # no command finds it again, to continue it

    @property
    def left(self) -> list[Member]:
        """What is to be submitted."""
        return [member for member in self.members if member.prepared is not None]

    @property
    def file(self) -> Path:
        return _file(self.output, self.id)


def prepare(request: Request, at_once: int | None, anew: bool = False) -> Sweep:
    """Plan every combination. UserError: everything that is wrong with any of them.

    at_once  how many runs side by side; None: as the executor has it
    anew     a sweep of its own, although the same one has been run
    """
    from nemotron_recipes.config.sweep import expand  # it imports Hydra, which a list of runs does not need

    environment = read_environment(Path(request.cwd))
    found = expand(request.overrides, Catalog(config_roots(request.config_dirs, Path(request.cwd))))
    with lifecycle.site_of(request.profile, environment) as (site, homes):
        plans = _plans(request, found, site)
        name = plans[0].stages[0].placement.executor
        sweep_id = f"{request.family}-{request.stage}-{request.config}-sweep-{_digest(request, plans, anew)}"
        at_once = at_once or get_executor(name).at_once
        known = _known(environment.output, sweep_id)
        views = {Path(view.path).name: view for view in lifecycle.load_all([*known.values()])}
        members = []
        for plan, (_, values) in zip(plans, found, strict=True):
            noted = known.get(frozenset(values))
            view = views.get(noted.name) if noted else None
            members.append(_member(replace(plan, sweep=sweep_id), values, view, homes))
    return Sweep(sweep_id, plans[0].title, environment.output, _ordered(members, at_once), at_once, known, anew)


def submit(
    sweep: Sweep, preflight: bool = True, tell: Callable[[list[Problem]], None] | None = None
) -> list[JobHandle]:
    """Submit what is left, in order. UserError, before anything is started: what can't run of any of them; `tell`
    hears before that what is no reason to refuse them.

    JobFailed or UserError in the middle says what was submitted; the same command again continues.
    """
    problems: list[Problem] = []
    remarks: list[Problem] = []
    asked: set[str] = set()
    for member in sweep.left:
        place = _asked_of(_prepared(member).plan)
        try:
            others = [_prepared(other).plan for other in sweep.left if other is not member]
            remarks += lifecycle.check(_prepared(member), preflight and place not in asked, others)
            asked.add(place)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    if remarks and tell is not None:
        tell([*dict.fromkeys(remarks)])
    handles: list[JobHandle] = []
    with _alone(sweep):
        runs = [{"run": member.run, "values": list(member.values)} for member in sweep.members]
        tree = {"id": sweep.id, "command": sweep.title, "at_once": sweep.at_once, "runs": runs}
        write_sealed(sweep.file, tree, kind="sweep")
        for member in sweep.left:
            try:
                handles.append(lifecycle.submit(_prepared(member), preflight=False))
            except (NemotronError, KeyboardInterrupt) as error:
                raise _broken_off(sweep, member, handles, error) from None
    return handles


def _asked_of(plan: Plan) -> str:
    """All that a preflight looks at: of runs that are alike in it, a machine or a cluster has to be asked once."""
    looked_at = []
    for stage in map(asdict, plan.stages):
        said = [stage[key] for key in ("placement", "inputs", "method", "resume_from")]
        weighs = [stage["config"].get("model"), stage["config"].get("peft"), stage["estimate"].get("disk")]
        looked_at.append([*said, *weighs, stage["launch"]["imports"]])
    return to_json(looked_at)


def runs_of(output: Path, text: str) -> list[str]:
    """Ids of the runs of the sweep of that id, as far as they were submitted; [] when there is no such sweep."""
    if "/" in text or not text:
        return []
    return [folder.name for folder in _known(output, text).values() if RunDir(folder).plan.exists()]


def _plans(request: Request, found: Sequence[tuple[tuple[str, ...], tuple[str, ...]]], site: Environment) -> list[Plan]:
    plans, wrong = [], []
    for overrides, values in found:
        try:
            plans.append(lifecycle.plan(replace(request, overrides=overrides), site))
        except UserError as error:
            wrong.append((values, error.problems))
    if wrong:
        everywhere = set.intersection(*(set(problems) for _, problems in wrong)) if len(wrong) == len(found) else set()
        each = [
            replace(problem, what=f"{' '.join(values)}: {problem.what}")
            for values, problems in wrong
            for problem in problems
            if problem not in everywhere
        ]
        raise UserError(*(p for p in wrong[0][1] if p in everywhere), *each)
    return plans


def _digest(request: Request, plans: Sequence[Plan], anew: bool) -> str:
    """Of what its runs compute, and where: not of the order in which they were named."""
    runs = sorted([*plan.request.overrides, *(stage.fingerprint for stage in plan.stages)] for plan in plans)
    salt = secrets.token_hex(8) if anew else ""
    return sha256_text(json.dumps([request.family, request.words, request.profile, runs, salt]))[7:15]


def _member(plan: Plan, values: tuple[str, ...], view: RunView | None, homes: Path | None) -> Member:
    if view is not None and (view.state == "succeeded" or (view.state in GOES_ON and view.handle is not None)):
        return Member(values, view.id, view.path, view=view)
    if view is not None:  # the next attempt of the same run
        plan = replace(lifecycle.load_plan(RunDir(Path(view.path)).plan), after=None)
    home = homes / plan.id if homes else None
    prepared = None if all(stage.reused for stage in plan.stages) else lifecycle.rendered(plan, home)
    return Member(values, plan.id, str(home or plan.run_dir), prepared, view if prepared else None)


def _ordered(members: list[Member], at_once: int | None) -> tuple[Member, ...]:
    """Each that is to be submitted waits for the one that comes `at_once` before it, of those that are not over."""
    if at_once is None:
        return tuple(members)
    queue = [member.view.plan["run_dir"] for member in members if member.view is not None and _goes_on(member)]
    ordered = []
    for member in members:
        if member.prepared is not None:
            after = queue[-at_once] if len(queue) >= at_once else None
            queue.append(member.prepared.plan.run_dir)
            if after is not None:
                after_it = replace(member.prepared.plan, after=after)
                member = replace(member, prepared=lifecycle.rendered(after_it, member.prepared.home))
        ordered.append(member)
    return tuple(ordered)


def _goes_on(member: Member) -> bool:
    return member.prepared is None and member.view is not None and member.view.state in GOES_ON


def _prepared(member: Member) -> Prepared:
    assert member.prepared is not None
    return member.prepared


def _broken_off(
    sweep: Sweep, member: Member, handles: list[JobHandle], error: NemotronError | KeyboardInterrupt
) -> NemotronError:
    """The same error with what has been done by then, and how to go on."""
    done = ", ".join(handle.run for handle in handles) or "none"
    why = str(error) or "stopped"
    said = (
        f"{' '.join(member.values)}: {why}\n{len(handles)} of {len(sweep.left)} runs of the sweep are submitted: {done}"
    )
    fix = "run the same command again: it submits the others"
    if sweep.anew:
        fix = f"nemotron runs cancel {sweep.id} stops these; the same command again makes a whole sweep of its own"
    if isinstance(error, UserError):
        return UserError(Problem(said, fix=fix))
    kind = Cancelled if isinstance(error, KeyboardInterrupt) else JobFailed
    return kind(f"{said}\n{fix}")


def _file(output: Path, sweep_id: str) -> Path:
    return output / "sweeps" / f"{sweep_id}.json"


def _known(output: Path, sweep_id: str) -> dict[Values, Path]:
    """Values -> run folder, as an earlier submission of the same sweep has noted it."""
    tree = read_json(_file(output, sweep_id)) or {"runs": []}
    return {frozenset(run["values"]): output / "runs" / run["run"] for run in tree["runs"]}


@contextmanager
def _alone(sweep: Sweep) -> Iterator[None]:
    """UserError while somebody else submits the same sweep, or when it has changed since it was prepared."""
    folder = sweep.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{sweep.id}.lock", "ab") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = Problem(f"somebody else submits sweep {sweep.id} now", str(folder), "wait for that")
            raise UserError(problem) from None
        if _known(sweep.output, sweep.id) != sweep.noted:
            raise UserError(
                Problem(f"somebody else has submitted sweep {sweep.id} meanwhile", fix="run this once more")
            )
        yield
