"""Whether a plan can run on this cluster, asked before anything is queued."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from nemotron_recipes.errors import Problem
from nemotron_recipes.executors import checks, nemo_adapter
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.slurm import control, limits, trial
from nemotron_recipes.executors.slurm.container import missing_here
from nemotron_recipes.executors.slurm.profile import SlurmProfile, limit_seconds
from nemotron_recipes.executors.slurm.script import profile_of, tasks_of
from nemotron_recipes.executors.slurm.site import Association, Partition, Site, Unreadable, read_site
from nemotron_recipes.spec import Plan, StagePlan

# What a limit speaks of -> (field that decides it, its unit).
_LIMITED = {
    "MaxWall": ("time", ""),
    "node": ("nodes", " node(s)"),
    "cpu": ("cpus_per_task", " CPU(s)"),
    "mem": ("mem", " MB of memory"),
    "gres/gpu": ("gpus_per_node", " GPU(s)"),
}


def plan_problems(plan: Plan, beside: Sequence[Plan] = ()) -> list[Problem]:
    """What the cluster would refuse, or leave waiting for ever; everything at once. UserError: it can't be asked.

    beside   what is submitted together with it: limits on the number of jobs hold for all of it
    """
    try:
        site = read_site()
        policy = limits.read_policy(site) if limits.enforced(site) else None
    except control.Unreachable as error:
        raise control.missing(error) from None
    except Unreadable as error:
        fix = "--skip-preflight submits without these checks; please report what Slurm printed"
        return [Problem(f"Slurm printed what is not known here: {error}", fix=fix)]
    run = [stage for stage in plan.stages if stage.reused is None]
    order = [] if transport.current().name else nemo_adapter.home_problems()
    order += [*_order_problems(plan, run[0])] if run and plan.after else []
    found = (stage_problems(stage, profile_of(stage), site, plan.request.mode, plan.run_dir) for stage in run)
    problems = [*order, *(problem for problems in found for problem in problems), *_image_problems(run, site, plan)]
    others = [stage for other in beside for stage in other.stages if stage.reused is None]
    problems += [*policy_problems(run, site, policy, plan.request.mode, others)] if policy else []
    if any(problem.refuses for problem in problems):
        return problems
    return [*problems, *trial.problems(run, plan.request.mode)]


def _order_problems(plan: Plan, first: StagePlan) -> Iterator[Problem]:
    """What keeps Slurm from starting the run after another one."""
    profile, where = profile_of(first), checks.where(first, "dependency")
    fix = "leave out --max-parallel: all runs are queued at once"
    if profile.dependency and "?" in profile.dependency:
        yield Problem(f"dependency {profile.dependency!r} can't be joined with a wait for another run", where, fix)
    if "dependency" in {flag.lstrip("-") for flag in profile.remove}:
        yield Problem("--max-parallel needs sbatch's --dependency, which `remove` takes away", where, fix)


def stage_problems(stage: StagePlan, profile: SlurmProfile, site: Site, mode: str, run_dir: str) -> Iterator[Problem]:
    """Everything about a stage that this cluster will not take, or never start."""
    unfit = []  # the job starts in whichever of several partitions takes it
    for name in (profile.partition_for(mode) or "").split(","):
        partition = site.partition(name)
        if partition is None:
            known = ", ".join(p.name for p in site.partitions)
            what = f"the cluster has no partition '{name}'" if name else "no partition is set, and there is no default"
            yield Problem(what, checks.where(stage, "partition"), f"one of: {known}")
        else:
            unfit.append([*_partition_problems(stage, profile, site, partition)])
    if unfit and all(unfit):
        yield from unfit[0]
    if site.enforces_accounts and site.associations is not None:
        yield from _account_problems(stage, profile, site.associations)
    yield from _host_problems(stage, profile, run_dir)


def _partition_problems(stage: StagePlan, profile: SlurmProfile, site: Site, partition: Partition) -> Iterator[Problem]:
    where = f"partition {partition.name}"
    if partition.state != "UP":
        fix = "choose another partition, or wait until it is up"
        yield Problem(f"{where} is {partition.state}", checks.where(stage, "partition"), fix)
    seconds = limit_seconds(profile.time)
    if seconds is not None and partition.max_seconds is not None and seconds > partition.max_seconds:
        what = f"time {profile.time} is more than {where} gives: {partition.max_time}"
        yield Problem(what, checks.where(stage, "time"), f"run.time={partition.max_time}, or max_requeues to go on")
    nodes = stage.placement.nodes
    most = min(partition.nodes, partition.max_nodes if partition.max_nodes is not None else partition.nodes)
    if not partition.min_nodes <= nodes <= most:
        what = f"{nodes} node(s) are asked for, and {where} gives {max(1, partition.min_nodes)} to {most}"
        yield Problem(what, checks.where(stage, "nodes"), "change run.nodes, or the partition")
    elif lacking := _lacking(profile, site, partition, nodes):
        have = sorted({f"{k.cpus} CPUs, {k.memory} MB, {k.gpus} GPU(s)" for k in site.nodes_of(partition.name)})
        fix = f"its nodes have {'; or '.join(have)}"
        what = f"{where} has fewer than {nodes} node(s) with {lacking}"
        yield Problem(what, checks.where(stage, "partition"), fix)
    if partition.accounts is not None and profile.account and profile.account not in partition.accounts:
        fix = f"it takes {', '.join(sorted(partition.accounts))}"
        yield Problem(f"{where} does not take account {profile.account}", checks.where(stage, "account"), fix)
    if profile.account in partition.denied_accounts:
        what = f"{where} refuses account {profile.account}"
        yield Problem(what, checks.where(stage, "account"), "choose another account or partition")
    if profile.qos and (profile.qos in partition.denied_qos or (partition.qos and profile.qos not in partition.qos)):
        fix = f"it takes {', '.join(sorted(partition.qos))}" if partition.qos else "choose another QOS or partition"
        yield Problem(f"{where} does not take QOS {profile.qos}", checks.where(stage, "qos"), fix)


def _lacking(profile: SlurmProfile, site: Site, partition: Partition, nodes: int) -> str:
    """What fewer nodes have than are asked for, in words; "" when there are enough."""
    memory = memory_mb(profile.mem)
    wanted = (
        ("GPU(s)", profile.gpus_per_node or 0, "gpus"),
        ("CPUs", profile.cpus_per_task or 0, "cpus"),
        ("MB of memory", memory or 0, "memory"),
    )
    fitting = [kind for kind in site.nodes_of(partition.name) if all(getattr(kind, f) >= n for _, n, f in wanted)]
    if sum(kind.count for kind in fitting) >= nodes:
        return ""
    return ", ".join(f"{number} {unit}" for unit, number, _ in wanted if number)


def memory_mb(text: str | None) -> int | None:
    """A size as sbatch's --mem has it, in MB; 0: all of a node; None without one, and for what sbatch refuses."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", text or "", re.IGNORECASE)
    if not found:
        return None
    factor = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024 * 1024}[found[2].upper()]
    return round(int(found[1]) * factor)


def _account_problems(
    stage: StagePlan, profile: SlurmProfile, associations: tuple[Association, ...]
) -> Iterator[Problem]:
    mine = sorted({found.account for found in associations})
    if not mine:
        yield Problem("this user has no account on the cluster", checks.where(stage, "account"), "ask the site")
        return
    if profile.account and profile.account.lower() not in (account.lower() for account in mine):
        what = f"account {profile.account} is not one of this user's"
        yield Problem(what, checks.where(stage, "account"), f"one of: {', '.join(mine)}")
        return
    allowed = {q for a in associations if not profile.account or a.account == profile.account.lower() for q in a.qos}
    if profile.qos and allowed and profile.qos not in allowed:
        what = f"QOS {profile.qos} does not go with account {profile.account or ', '.join(mine)}"
        yield Problem(what, checks.where(stage, "qos"), f"one of: {', '.join(sorted(allowed))}")


def policy_problems(
    stages: list[StagePlan], site: Site, policy: limits.Policy, mode: str, beside: Sequence[StagePlan] = ()
) -> Iterator[Problem]:
    """Limits of QOS, account and user because of which a job would be refused, or wait for ever."""
    queued = control.ask("squeue", "--me", "--array", "--noheader", "--format=%a|%q").splitlines()
    before: Counter[str] = Counter()  # holder of limits -> jobs that are submitted with it, or before it
    for place, stage in enumerate((*beside, *stages)):
        profile = profile_of(stage)
        jobs = 1 + tasks_of(stage)
        choices = []  # the account where none is set, and which of several partitions, are for Slurm to choose
        for name in (profile.partition_for(mode) or "").split(","):
            partition = site.partition(name)
            for member in policy.mine:
                if profile.account and member.account != profile.account.lower():
                    continue
                if partition is None or member.partition not in ("", partition.name):
                    continue
                rules = [*limits.rules(policy, member, profile.qos, partition.own_qos)]
                choices.append((rules, [*_over(stage, profile, rules, jobs, queued, before)]))
        if choices:
            rules, problems = next((each for each in choices if not each[1]), choices[0])
            if place >= len(beside):
                yield from problems
            before.update(dict.fromkeys((rule.holder for rule in rules), jobs))


def _over(
    stage: StagePlan,
    profile: SlurmProfile,
    rules: list[limits.Rule],
    jobs: int,
    queued: list[str],
    before: Mapping[str, int],
) -> Iterator[Problem]:
    """Those of the limits that a stage's job asks for more than."""
    nodes, gpus = stage.placement.nodes, profile.gpus_per_node or profile.gpus_per_task or 0
    asked = {
        "MaxWall": limit_seconds(profile.time) or 0,
        "node": nodes,
        "cpu": nodes * (profile.cpus_per_task or 0),
        "mem": nodes * (memory_mb(profile.mem) or 0),
        "gres/gpu": nodes * gpus,
    }
    for rule in rules:
        what = f"{rule.holder}: {rule.limit} is {rule.text}"
        kind = rule.limit.partition(" ")[2] or rule.limit
        if kind in ("MaxSubmit", "GrpSubmit"):
            scope, _, name = rule.holder.partition(",")[0].partition(" ")
            column = 1 if scope == "QOS" else 0
            ours = sum(line.split("|")[column] == name for line in queued if "|" in line)
            number = ours + before.get(rule.holder, 0) + jobs
            if number > rule.value:
                fix = "wait until some are over, or submit fewer stages, or runs of a sweep, at once"
                where = checks.where(stage, "qos" if scope == "QOS" else "account")
                yield Problem(f"{what}, and this would be job {number} of this user", where, fix)
        elif kind in ("MaxJobs", "GrpJobs"):
            if rule.value < 1:
                yield Problem(f"{what}: it would never start", checks.where(stage, "account"), "choose another, or QOS")
        elif rule.limit.startswith("MinTRES"):
            if kind in _LIMITED and asked[kind] < rule.value and (asked[kind] or kind == "gres/gpu"):  # 0: not known
                field, unit = _LIMITED[kind]
                few = f"{what}{unit} at least, and {asked[kind]} are asked for: it would never start"
                yield Problem(few, checks.where(stage, field), "ask for more, or another QOS")
        elif kind in _LIMITED and asked[kind] > rule.value:
            field, unit = _LIMITED[kind]
            said = profile.time if kind == "MaxWall" else f"{asked[kind]}{unit}"
            yield Problem(
                f"{what}, and {said} is asked for", checks.where(stage, field), "ask for less, or another QOS"
            )


def _image_problems(stages: list[StagePlan], site: Site, plan: Plan) -> Iterator[Problem]:
    """What is known of images; of one that several stages run in, once."""
    from nemotron_recipes.executors.images import check

    looked = set()
    for stage in stages:
        profile, where = profile_of(stage), checks.where(stage, "container_image")
        partitions = profile.partition_for(plan.request.mode)
        # A container that is kept by name needs no image any more.
        if profile.image is None or profile.container_name or (profile.image, partitions) in looked:
            continue
        looked.add((profile.image, partitions))
        machines = site.architectures(partitions)
        if profile.image.startswith("/"):
            whole = transport.call(there.whole_image, profile.image)
            if whole is not None:
                yield from check.of_squashfs(profile.image, whole, machines, where)
        else:
            yield from check.of_registry(profile.image, machines, where, plan.request.offline)


def _host_problems(stage: StagePlan, profile: SlurmProfile, run_dir: str) -> Iterator[Problem]:
    """Files that nodes need, as this machine sees them."""
    fix = "name one that is there; --skip-preflight where this machine can't see what nodes see"
    for field, path in missing_here(profile, run_dir):
        what = f"there is no image {path}" if field == "container_image" else f"there is no {path} to mount"
        yield Problem(what, checks.where(stage, field), fix)
    if profile.image:
        return
    if profile.python and profile.python.startswith("/") and not transport.call(there.is_program, profile.python):
        yield Problem(f"there is no interpreter {profile.python}", checks.where(stage, "python"), fix)
