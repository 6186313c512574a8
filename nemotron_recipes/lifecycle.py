"""Every effect of a command in one place: prepare (reads only), submit, watch, cancel, apply.

`prepare` is all that `--dry-run` does; `submit` sends exactly what `prepare` returned.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.records import Ask, RunView, Settle, load_run, load_runs, run_folders
from nemotron_recipes.config.catalog import Catalog, config_roots
from nemotron_recipes.config.profiles import Environment, read_environment
from nemotron_recipes.errors import NemotronError, Problem, UserError
from nemotron_recipes.executors import Executor, Liveness, get_executor, sites, there, transport
from nemotron_recipes.fsio import files_below, write_atomic
from nemotron_recipes.mirror.journal import Journal, open_journal, pending, unmark
from nemotron_recipes.mirror.sync import Outcome, replay_all
from nemotron_recipes.redact import scrub, secret_values
from nemotron_recipes.rundir import Damaged, RunDir, append_event, read_json, write_sealed
from nemotron_recipes.seals import opened
from nemotron_recipes.spec import Examination, Finding, JobHandle, Outlook, Plan, Rendered, Request, Tree, Wait, to_json

POLL_SECONDS = 0.2
COPY_SECONDS = 1.0
OPEN = ("running", "stalled", "pending", "lost")


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
    environment = environment or read_environment(Path(request.cwd))
    profile = checked_profile(environment, request.profile) if request.profile else {}
    with _asking(sites.of_profile(profile)) as where:
        if not where.name:
            return rendered(plan(request, environment))
        folder = profile["remote_job_dir"].rstrip("/")
        made = plan(request, replace(environment, artifacts={"output": folder, "store": f"{folder}/store"}))
        return rendered(made, environment.output / "runs" / made.id)


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


def refuse_remote(request: Request, what: str) -> None:
    """UserError where the profile's cluster is behind ssh, for what can't be done from there."""
    environment = read_environment(Path(request.cwd))
    if request.profile and sites.login_of(environment.profile(request.profile)):
        fix = "run the same command on the cluster's login node"
        raise UserError(Problem(f"{what} can't be submitted over SSH", f"profile [{request.profile}]", fix))


def rendered(plan: Plan, home: Path | None = None) -> Prepared:
    """A plan and what its executor makes of it."""
    return Prepared(plan, get_executor(plan.stages[0].placement.executor).render(plan), home=home)


def check(prepared: Prepared, preflight: bool = True) -> None:
    """What `submit` refuses before it writes anything. UserError: all of it."""
    _refuse_unpinned(prepared.plan)
    _refuse_rerun(RunDir(transport.current().near(prepared.plan.run_dir)))
    if preflight:
        _refuse_unfit(prepared)


def submit(prepared: Prepared, preflight: bool = True) -> JobHandle:
    """Write the run folder and hand it to the executor. UserError: an input is unpinned, or the plan has run already;
    or, unless `preflight` is False, all that the executor and the folders can't do, before anything is written.

    A plan whose run failed, was cancelled or got lost may be submitted again: that is its next attempt.
    """
    plan = prepared.plan
    where = sites.of_profile(plan.stages[0].placement.options, prepared.home, plan.run_dir)
    with _asking(where):
        check(prepared, preflight)
        return _submit(prepared, RunDir(where.near(plan.run_dir)))


def _submit(prepared: Prepared, run: RunDir) -> JobHandle:
    plan, where = prepared.plan, transport.current()
    try:
        _write_run(run, prepared)
    except (KeyboardInterrupt, UserError):  # Ctrl-C, or the code is not what was planned any more
        if run.plan.exists():
            append_event(run.events, "cancelled", stage=None, attempt=None)
        raise
    except OSError as error:
        problem = Problem(f"the run folder {run.path} can't be written: {error.strerror}", fix="see [artifacts] output")
        raise UserError(problem) from None
    if where.name:
        try:
            _send(run)
        except (transport.Unreachable, OSError) as error:
            append_event(run.events, "cancelled", stage=None, attempt=None)
            if isinstance(error, transport.Unreachable):
                raise
            what = f"the run folder can't be written: {error.strerror}"
            raise UserError(Problem(what, error.filename or "", fix="see remote_job_dir")) from None
    else:
        open_journal(plan, run.path.parents[1])
    fields = {"executor": prepared.executor, "mode": plan.request.mode}
    transport.call(there.event, run.events, "submitted", fields)
    return get_executor(prepared.executor).submit(plan, prepared.rendered)


def _send(run: RunDir) -> None:
    """The run's folder to where the run will be: all that was written here before anything was submitted."""
    pieces: list[list[Any]] = [[]]
    size = 0
    for path in files_below(run.path):
        name = path.relative_to(run.path).as_posix()
        if name in (run.events.name, run.handle.name) or name.startswith(".") or name.endswith(".lock"):
            continue
        data = path.read_bytes()
        if size + len(data) > there.PIECE and pieces[-1]:
            pieces.append([])
            size = 0
        pieces[-1].append([name, data, 0o644])
        size += len(data)
    for piece in pieces:
        transport.call(there.receive, run.path, piece)


def examine(profile: str, deep: float | None = None) -> Examination:
    """What the machine or cluster behind a profile, and the folders of env.toml, can do. UserError: no such profile.

    deep   look into the nodes as well, with a job that may wait so many seconds for its start
    """
    environment = read_environment()
    complete = checked_profile(environment, profile)
    places = {"output folder": str(environment.output), "artifact store": str(environment.store)}
    with _asking(sites.of_profile(complete)) as where:
        if where.name:
            places = {f"remote_job_dir on {where.name}": complete["remote_job_dir"]}
        executor = get_executor(complete["executor"])
        inside = Examination(())
        if deep is not None:
            shared, _ = transport.call(there.room, next(iter(places.values())))
            inside = executor.look_into_nodes(complete, shared, deep)
        found = executor.examine(complete)
        told = [said for name, folder in places.items() for said in transport.call(there.look_at, name, folder)]
    findings = (*found.findings, *(Finding(*said) for said in told), *inside.findings)
    return Examination(findings, {**found.suggestion, **inside.suggestion} if found.suggestion else {})


def checked_profile(environment: Environment, name: str) -> Tree:
    """A profile of env.toml, complete. UserError: there is none, or it has mistakes."""
    from nemotron_recipes.planning.validate import check_run

    complete, problems = check_run(environment.profile(name), lambda key: f"profile [{name}]")
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
    with _asking(sites.of_profile(saved.stages[0].placement.options)) as where:
        again.check_same(saved, run_dir)
        tree = again.renewed(saved, json.loads(to_json(saved)))
        plan = again.with_own_path(TypeAdapter(Plan).validate_python(tree))
        executor = get_executor(plan.stages[0].placement.executor)
        problems = [problem for stage in plan.stages for problem in executor.check(stage)]
        if problems:
            raise UserError(*problems)
        home = run_dir.with_name(plan.id) if where.name else None
        return Prepared(plan, executor.render(plan), snapshot_of(run_dir), home), again.differences_now(saved)


def watch(handle: JobHandle, poll: Callable[[Outlook | None], None]) -> None:
    """Call `poll` with what the executor said last, until the run has ended, and once after.

    The executor is asked beside it, in a thread: a scheduler that does not answer must not hold up the log. It is asked
    at once when the run folder has news, else less and less often.
    """
    events, news = RunDir(Path(handle.run_dir)).events, 0
    asking, copying = _Asking(handle), _Copying(handle)
    asking.start()
    copying.start()
    try:
        while (outlook := asking.told()) is None or outlook.alive in ("queued", "running"):
            poll(outlook)
            size = events.stat().st_size if events.exists() else 0
            if size != news:
                news = size
                asking.wake.set()
            time.sleep(POLL_SECONDS)
    finally:
        asking.over = True
        asking.wake.set()
        copying.over.set()
    _refresh(handle)
    poll(outlook)


class _Asking(threading.Thread):
    """Asks a run's executor again and again."""

    def __init__(self, handle: JobHandle):
        super().__init__(daemon=True)
        self.handle, self.executor = handle, get_executor(handle.executor)
        self.wake, self.over = threading.Event(), False
        self._outlook: Outlook | None = None
        self._error: BaseException | None = None

    def told(self) -> Outlook | None:
        """The newest answer; None before the first. Raises what asking has raised."""
        if self._error is not None:
            raise self._error
        return self._outlook

    def run(self) -> None:
        began = time.monotonic()
        while not self.over:
            self.wake.clear()
            try:
                with transport.through(sites.of_handle(self.handle)):
                    self._outlook = self.executor.look(self.handle)
            except BaseException as error:  # noqa: BLE001  raised again where the answer is waited for
                self._error = error
                return
            waited = time.monotonic() - began
            self.wake.wait(min(self.executor.ask_seconds, max(POLL_SECONDS, waited / 10)))


class _Copying(threading.Thread):
    """Keeps the copy of a run's folder that is elsewhere; ends at once where it is read where it lies."""

    def __init__(self, handle: JobHandle):
        super().__init__(daemon=True)
        self.handle, self.over = handle, threading.Event()

    def run(self) -> None:
        while sites.of_handle(self.handle).name and not self.over.wait(COPY_SECONDS):
            _refresh(self.handle)


@contextmanager
def _asking(where: transport.Transport) -> Iterator[transport.Transport]:
    """Speak to that machine; that it can't be reached is the request's fault."""
    with transport.through(where):
        try:
            yield where
        except transport.Unreachable as error:
            raise UserError(Problem(str(error), fix=error.fix)) from None


@contextmanager
def _at(handle: JobHandle) -> Iterator[Executor]:
    """The executor of a run, speaking to the run's own machine, with what is new there."""
    _refresh(handle)
    with transport.through(sites.of_handle(handle)):
        yield get_executor(handle.executor)


def _refresh(handle: JobHandle) -> None:
    """What can't be brought here now is said by whoever asks the scheduler; what is here stays."""
    with suppress(NemotronError, OSError):  # of one run among many: the others are shown
        sites.of_handle(handle).refresh()


def cancel(handle: JobHandle) -> None:
    """Stop a run and everything that it started."""
    with _at(handle) as executor:
        executor.cancel(handle)
    _refresh(handle)


def liveness(handle: JobHandle) -> Liveness:
    """Whether anybody still runs it, as the run's own executor says."""
    with _at(handle) as executor:
        return executor.liveness(handle)


def detaches(handle: JobHandle) -> bool:
    """Whether whoever follows the run may leave it running by Ctrl-C; otherwise that stops it."""
    return get_executor(handle.executor).detaches


def ask_seconds(handle: JobHandle) -> float:
    """How often at most its executor should be asked by somebody who waits for long."""
    return get_executor(handle.executor).ask_seconds


def look(handle: JobHandle) -> Outlook:
    """What the executor says of the run and its jobs."""
    with _at(handle) as executor:
        return executor.look(handle)


def waits(handle: JobHandle) -> list[Wait]:
    """Why jobs of the run have not started."""
    with _at(handle) as executor:
        return executor.waits(handle)


def differences(handle: JobHandle) -> list[str]:
    """Where the sources disagree about the run."""
    with _at(handle) as executor:
        return executor.differences(handle)


def shell(handle: JobHandle, stage: str, command: Sequence[str]) -> list[str]:
    """argv that runs a command where a stage runs."""
    with _at(handle) as executor:
        return executor.shell(handle, stage, command)


def load(run_dir: Path) -> RunView:
    """One run as it stands now. UserError when there is no such run."""
    with suppress(ValueError):  # damaged: the run is shown with that
        handle = read_json(RunDir(run_dir).handle)
        if handle:
            _refresh(JobHandle(**handle))
    return _tidied(load_run(run_dir, liveness, _settle))


def newest_runs(root: Path, number: int | None) -> list[RunView]:
    """The newest runs below `root` (None: all), newest first. A scheduler is asked once for all of its runs."""
    return load_all(run_folders(root, number))


def load_all(run_dirs: Sequence[Path]) -> list[RunView]:
    """These runs as they stand now, newest first; a scheduler is asked once for all of its runs."""
    asked: dict[tuple[str, Any], Executor] = {}

    def whose(handle: JobHandle) -> tuple[str, Any]:
        return handle.executor, sites.login_in(handle)

    def together(handles: list[JobHandle]) -> tuple[Ask, Settle]:
        for handle in handles:
            _refresh(handle)
        for key in {whose(handle): handle for handle in handles}:
            group = [handle for handle in handles if whose(handle) == key]
            with transport.through(sites.of_handle(group[0])):
                asked[key] = get_executor(key[0]).together(group)
        return liveness_of, settle

    def liveness_of(handle: JobHandle) -> Liveness:
        with transport.through(sites.of_handle(handle)):
            return asked[whose(handle)].liveness(handle)

    def settle(handle: JobHandle) -> list[Tree]:
        with transport.through(sites.of_handle(handle)):
            return asked[whose(handle)].settle(handle)

    def compared(view: RunView) -> RunView:
        if view.handle is None or whose(view.handle) not in asked or view.state not in OPEN:
            return view
        with transport.through(sites.of_handle(view.handle)):
            return replace(view, differences=tuple(asked[whose(view.handle)].differences(view.handle)))

    return [_tidied(compared(view)) for view in load_runs(run_dirs, together)]


def mirror(output: Path) -> list[Outcome]:
    """Tell W&B what is missing of every run below `output`, oldest first."""
    active = set()
    for name in pending(output):
        journal = Journal(output / "runs" / name)
        with suppress(Damaged):  # told below, as the reason why W&B hears nothing of it
            if journal.target is not None and RunDir(journal.run_dir).plan.exists():
                view = load(journal.run_dir)
                _note_what_is_missing(journal, view)
                if view.state in ("running", "stalled", "pending"):
                    active.add(name)
    outcomes = replay_all(output, active)
    for outcome in outcomes:
        if not outcome.left and not outcome.why and outcome.run not in active:
            unmark(output, outcome.run)
    return outcomes


def _note_what_is_missing(journal: Journal, view: RunView) -> None:
    """What no worker could note: it was killed, its machine died, or the disk was full. The records are the truth."""
    for stage in view.stages:
        if stage.state == "succeeded":
            known = {entry["key"] for entry in journal.entries()}
            if f"ended {stage.name} {stage.attempt}" not in known:
                journal.started(stage.name, stage.attempt, stage.parents)
                for slot, made in stage.outputs.items():
                    journal.output(stage.name, slot, made["name"], made["version"])
                journal.ended(stage.name, stage.attempt, stage.state, stage.exit_code or 0, stage.results)
    known = {entry["key"] for entry in journal.entries()}
    for stage in view.stages:
        began, ended = (f"{word} {stage.name} {stage.attempt}" for word in ("started", "ended"))
        if began in known and ended not in known and stage.state in ("failed", "cancelled", "lost"):
            code = stage.exit_code if stage.exit_code is not None else 1
            journal.ended(stage.name, stage.attempt, stage.state, code, stage.results)


def _tidied(view: RunView) -> RunView:
    """Nothing of a run that has failed stays in a queue for ever: whoever looks at it next takes it away."""
    if view.handle is None or view.state not in ("failed", "cancelled", "lost"):
        return view
    with transport.through(sites.of_handle(view.handle)):
        found = get_executor(view.handle.executor).tidy(view.handle)
    return replace(view, differences=(*view.differences, *found))


def _settle(handle: JobHandle) -> list[Tree]:
    with _at(handle) as executor:
        found = executor.settle(handle)
    _refresh(handle)
    return found


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


def _refuse_unpinned(plan: Plan) -> None:
    unpinned = [
        Problem(
            f"{stage.name}: {key} is {artifact.label}",
            fix="pin it (hf://ORG/NAME@COMMIT), or plan without --offline",
        )
        for stage in plan.stages
        for key, artifact in stage.inputs.items()
        if artifact.source in ("hub", "wandb") and artifact.revision is None
    ]
    if unpinned:
        raise UserError(*unpinned)


def _refuse_unfit(prepared: Prepared) -> None:
    """All at once: folders that are closed or too full, and what the executor knows that would not work."""
    from nemotron_recipes.planning.disk import disk_problems

    plan = prepared.plan
    places = {"[artifacts] output": plan.run_dir, "[artifacts] store": plan.store}
    if transport.current().name:
        places = {"remote_job_dir": plan.run_dir}
    told = {where: transport.call(there.refusal, folder) for where, folder in places.items()}
    problems = [Problem(said, where) for where, said in told.items() if said]
    problems += () if problems else disk_problems(plan)
    problems += _unreadable(plan)
    problems += get_executor(prepared.executor).preflight(plan)
    if problems:
        raise UserError(*problems)


def _unreadable(plan: Plan) -> Iterator[Problem]:
    """Inputs that lie somewhere by now, and can't be read there."""
    stages = [stage for stage in plan.stages if stage.reused is None]
    inputs = {
        artifact.uri: f"stage {stage.name}, {key}"
        for stage in stages
        for key, artifact in stage.inputs.items()
        if artifact.source in ("path", "store")
    }
    for path, why in transport.call(there.unreadable, [*inputs]) if inputs else ():
        yield Problem(f"{path} can't be read: {why}", inputs.get(path, ""), "restore it, or make the plan again")


def _refuse_rerun(run: RunDir) -> None:
    if not run.plan.exists():
        return
    view = load(run.path)
    if not view.plan:
        what = f"whether this plan is running is unknown: {view.explanation}"
        raise UserError(Problem(what, view.path, "mend it, or plan anew"))
    queued = view.state == "pending" and view.handle is not None and liveness(view.handle) == "queued"
    if queued or view.state in ("running", "stalled", "succeeded"):
        what = "is in the queue" if queued else "has run" if view.state == "succeeded" else "is running"
        fix = f"see nemotron runs show {view.id}; a new plan makes a new run"
        raise UserError(Problem(f"this plan {what} already", view.path, fix))


def _write_run(run: RunDir, prepared: Prepared) -> None:
    from nemotron_recipes.planning.code import snapshot

    plan = prepared.plan
    run.path.mkdir(parents=True, exist_ok=True)
    write_sealed(run.plan, asdict(plan))
    write_sealed(run.rendered, asdict(prepared.rendered))
    snapshot(run.path, plan.code, prepared.code)
    patch = _patch(prepared)
    if patch:
        write_atomic(run.path / "code.patch", patch.encode("utf-8", "surrogateescape"))
    for stage in prepared.rendered.stages:
        near = transport.current().near
        near(stage.cwd).mkdir(parents=True, exist_ok=True)
        for path, text in stage.files.items():
            write_atomic(near(path), text)


def _patch(prepared: Prepared) -> str | None:
    """What git had not committed of the code that runs; without the values of secrets."""
    from nemotron_recipes.planning.code import git_diff

    plan = prepared.plan
    if plan.code.git_diff_digest is None:
        return None
    if prepared.code is not None:  # a rerun: the patch lies beside the code that is run once more
        path = prepared.code.parent.parent / "code.patch"
        return path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else None
    named = [name for stage in plan.stages for name in stage.placement.secrets]
    return scrub(git_diff() or "", secret_values(os.environ, named))


def rendered_json(prepared: Prepared) -> str:
    """Plan and rendered bytes as one JSON document: what `--dry-run --json` prints."""
    return json.dumps(
        {"plan": json.loads(to_json(prepared.plan)), "rendered": json.loads(to_json(prepared.rendered))},
        indent=2,
        sort_keys=True,
        ensure_ascii=False,
    )
