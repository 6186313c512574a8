"""Why a job waits, in words: Slurm's reason codes, the limit that a code speaks of, and what would fit. Pure.

The codes are those of `job_reason_string` in Slurm's slurm_protocol_defs.c (22.05 to 25.x). Most name a limit by its
parts (QOSMaxGRESPerUser: of a QOS, at most so many GPUs for one user); one grammar reads them, a table the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

NEVER = "DependencyNeverSatisfied"

# What a code means, and what to do about it.
WORDS: dict[str, tuple[str, str]] = {
    "None": ("it was submitted a moment ago", ""),
    "Priority": ("jobs of higher priority wait for the same nodes", ""),
    "Resources": (
        "it is the next in line, and not enough is free",
        "less of it may start earlier: run.nodes, run.time",
    ),
    "Dependency": ("it waits for another job", ""),
    NEVER: ("the job that it waits for did not succeed, so it will never start", "start the run again"),
    "BeginTime": ("it must not start before a set time; a job that was put back waits for a while", ""),
    "JobHeldUser": ("it is held by its owner", "scontrol release JOB"),
    "JobHeldAdmin": ("an administrator holds it", "ask the site"),
    "JobHoldMaxRequeue": ("it was put back too often and is held now", "scontrol release JOB, once the cause is gone"),
    "JobArrayTaskLimit": ("its array runs as many tasks at once as it may", ""),
    "PartitionDown": ("its partition is down", "wait, or choose another: run.partition"),
    "PartitionInactive": ("its partition takes jobs, but starts none now", "wait, or choose another: run.partition"),
    "PartitionTimeLimit": ("it asks for more time than its partition gives", "lower run.time"),
    "PartitionNodeLimit": ("its partition gives no such number of nodes", "change run.nodes"),
    "PartitionConfig": ("its partition can't give what it asks for", "ask for less, or another run.partition"),
    "Reservation": ("it waits for its reservation to begin", ""),
    "ReservationDeleted": ("its reservation is gone", "submit without it"),
    "ReservationInvalid": ("its reservation is not valid", "submit without it"),
    "ReqNodeNotAvail": ("nodes that it needs are down, drained or reserved", "let others do: run.exclude, no nodelist"),
    "NodeDown": ("a node that it needs is down", "let others do: run.exclude"),
    "BadConstraints": ("no node has all that it asks for together", "look at run.constraint, run.gres and run.mem"),
    "Constraints": ("no node has all that it asks for together", "look at run.constraint, run.gres and run.mem"),
    "Licenses": ("it waits for a licence", ""),
    "InvalidAccount": ("its account is not valid any more", "set run.account"),
    "InvalidQOS": ("its QOS is not valid any more", "set run.qos"),
    "AccountNotAllowed": ("its account may not use this partition", "set run.account or run.partition"),
    "QOSNotAllowed": (
        "its QOS may not be used with this account or partition",
        "set run.qos, run.account or run.partition",
    ),
    "QOSUsageThreshold": ("what was used so far is more than its QOS allows", "wait, or set run.qos"),
    "AccountingPolicy": ("a limit of the accounting is reached", "ask the site which"),
    "Cleaning": ("its earlier attempt is still being cleaned up", ""),
    "Prolog": ("the site's prolog runs", ""),
    "JobLaunchFailure": ("it could not be started on its nodes", "look at the batch log"),
    "SystemFailure": ("Slurm, the file system or the network failed", "ask the site"),
    "NonZeroExitCode": ("it ended with an exit code other than 0", ""),
    "TimeLimit": ("it reached its time limit", ""),
    "OutOfMemory": ("it used more memory than it may", ""),
    "InactiveLimit": ("it did nothing for too long", ""),
    "DeadLine": ("it could not end before its deadline", "move the deadline, or lower run.time"),
    "MaxMemPerLimit": ("it asks for more memory than a node or a CPU may give", "lower run.mem"),
    "MaxPoweredUpNodes": ("as many nodes as the site allows are switched on", ""),
    "MpiPortsBusy": ("the MPI ports are taken", ""),
    "FedJobLock": ("the clusters of the federation agree on where it runs", ""),
    "FrontEndDown": ("the cluster's front end is down", "ask the site"),
    "SchedDefer": ("the scheduler puts off all starts for now", ""),
    "BurstBufferResources": ("it waits for room in the burst buffer", ""),
    "BurstBufferStageIn": ("the burst buffer is being filled", ""),
    "BurstBufferOperation": ("the burst buffer failed", "ask the site"),
    "AssociationJobLimit": ("its account runs as many jobs as it may", ""),
    "AssociationResourceLimit": ("its account uses as much as it may", ""),
    "AssociationTimeLimit": ("its account has used up its time", ""),
    "QOSJobLimit": ("its QOS runs as many jobs as it may", ""),
    "QOSResourceLimit": ("its QOS uses as much as it may", ""),
    "QOSTimeLimit": ("its QOS has used up its time", ""),
}

# Part of a code -> name of the resource in Slurm's limits, and for people.
_RESOURCES = {
    "Cpu": ("cpu", "CPUs"),
    "CPU": ("cpu", "CPUs"),
    "Node": ("node", "nodes"),
    "Mem": ("mem", "memory"),
    "Memory": ("mem", "memory"),
    "GRES": ("gres/gpu", "GPUs"),  # other GRES exist; on the clusters that this is for, it is GPUs
    "Billing": ("billing", "billing units"),
    "Energy": ("energy", "energy"),
    "BB": ("bb", "burst buffer"),
    "License": ("license", "licences"),
    "Unknown": ("", "some resource"),
}
_LIMIT = re.compile(
    r"(?P<of>QOS|Assoc|)(?P<kind>Grp|Max|Min)"
    rf"(?P<what>{'|'.join(sorted(_RESOURCES, key=len, reverse=True))}|WallDuration|Wall|SubmitJobs?|Jobs?)"
    r"(?P<time>RunMinutes|RunMins|Minutes|)(?:Per(?P<per>Job|User|Account|Node)|)(?:Limit|NotSatisfied|)$"
)
_EACH = {"Job": "one job", "User": "one user", "Account": "one account", "Node": "one node of a job"}


@dataclass(frozen=True)
class Limit:
    """What a code such as QOSMaxGRESPerUser speaks of.

    scope      "qos", "association", or "" where the code leaves it open
    field      where `scontrol show assoc_mgr` writes it: GrpTRES, MaxTRESPU, MaxWallPJ, ...
    resource   the part of that field: cpu, node, gres/gpu, ...; "" where the field is one number
    per        whose: "all", or Job, User, Account, Node
    """

    scope: str
    field: str
    resource: str
    per: str
    words: str

    @property
    def of_one_job(self) -> bool:
        """Whether no waiting helps: the job itself asks for too much, or too little."""
        return self.per in ("Job", "Node")


def limit_of(code: str) -> Limit | None:
    """The limit that a code speaks of; None for a code of another kind."""
    found = _LIMIT.match(code)
    if not found:
        return None
    scope = {"QOS": "qos", "Assoc": "association", "": "qos"}[found["of"]]
    holder = {"qos": "its QOS", "association": "its account"}[scope]
    kind, what, spent, per = found["kind"], found["what"], found["time"], found["per"]
    if what.startswith(("Job", "SubmitJob")):
        per = per or ("all" if kind == "Grp" or scope == "qos" else "User")
        field = {"Grp": "Grp", "Max": "Max"}[kind] + ("SubmitJobs" if what.startswith("Submit") else "Jobs")
        field += {"User": "PU", "Account": "PA"}.get(per, "") if scope == "qos" else ""
        who = "all jobs together" if per == "all" else _EACH[per]
        count = "submit" if what.startswith("Submit") else "run"
        return Limit(scope, field, "", per, f"{holder} lets {who} {count} only so many jobs at once")
    if what.startswith("Wall"):
        if kind == "Grp":
            return Limit(scope, "GrpWall", "", "all", f"{holder} has used up its time for all jobs together")
        return Limit(scope, "MaxWallPJ", "", "Job", f"{holder} gives a job less time than this one asks for")
    resource, name = _RESOURCES[what]
    if kind == "Min":
        return Limit(scope, "MinTRESPJ", resource, "Job", f"{holder} wants a job to ask for more {name} than this one")
    per = "all" if kind == "Grp" else per or "Job"
    who = "all its jobs together" if per == "all" else _EACH[per]
    field = "GrpTRES" if kind == "Grp" else "MaxTRES"
    field += {"": "", "Minutes": "Mins", "RunMinutes": "RunMins", "RunMins": "RunMins"}[spent]
    field += {"all": "", "Job": "PJ", "User": "PU", "Account": "PA", "Node": "PN"}[per]
    measure = f"minutes of {name}" if spent else name
    return Limit(scope, field, resource, per, f"{holder} gives {who} only so many {measure}")


def words_of(code: str) -> str:
    """A reason code for people; the code itself where nobody has told us what it means."""
    code = code.partition(",")[0].strip("()")  # ReqNodeNotAvail, UnavailableNodes:node3
    if code in WORDS:
        return WORDS[code][0]
    limit = limit_of(code)
    return limit.words if limit else f"Slurm says {code}" if code else ""


def advice_for(code: str) -> str:
    """What to do about it; "" where only waiting helps."""
    limit = limit_of(code)
    if limit is None:
        return WORDS.get(code.partition(",")[0].strip("()"), ("", ""))[1]
    if not limit.of_one_job:
        return "it starts when others have ended"
    more = "raise" if limit.field.startswith("Min") else "lower"
    keys = {"": "run.time", "node": "run.nodes", "gres/gpu": "run.nodes or run.gpus_per_node", "mem": "run.mem"}
    return f"{more} {keys.get(limit.resource, 'run.nodes or run.cpus_per_task')}, or choose another run.qos"


@dataclass(frozen=True)
class Measured:
    """A limit with its numbers, as Slurm writes them: `allowed`, `used` now (None where it does not count it)."""

    where: str
    allowed: str
    used: str | None


def measured(limit: Limit, details: Mapping[str, str], association_manager: str) -> list[Measured]:
    """The limit's values in what `scontrol show assoc_mgr` says, from those records that apply to this job.

    details   of the job: Account, QOS, UserId as `scontrol show job` has them
    """
    user = tuple(details.get("UserId", "").rstrip(")").split("("))  # name and number
    found = []
    for name, fields in _records(association_manager, details.get("QOS", ""), details.get("Account", ""), user):
        is_qos = name.startswith("QOS")
        if is_qos != (limit.scope == "qos"):
            continue
        text = fields.get(limit.field) or fields.get(limit.field.removesuffix("PJ")) or ""
        if limit.resource:
            text = dict(part.partition("=")[::2] for part in text.split(",")).get(limit.resource, "")
        value = re.match(r"([^()]*)(?:\(([^()]*)\))?$", text)
        if value and value[1] not in ("", "N"):
            found.append(Measured(f"{name} {limit.field}", value[1], value[2]))
    return found


def _records(text: str, qos: str, account: str, user: tuple[str, ...]) -> list[tuple[str, dict[str, str]]]:
    """(name, fields) of the QOS and of the associations of account and user, in what `scontrol show assoc_mgr` says.

    user   its name and its number: below a QOS some versions write the one, some the other
    """
    records: list[tuple[str, dict[str, str]]] = []
    current: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        words = dict(re.findall(r"([A-Za-z]\w*)=(\S*)", line))
        bare = line.strip()
        if line.startswith(("ClusterName=", "QOS=")):
            current, section = {}, ""
            name = re.sub(r"\(\d+\)$", "", words.get("QOS", ""))
            owner = re.sub(r"\(\d+\)$", "", words.get("UserName", ""))
            if "QOS" in words and name == qos:
                records.append((f"QOS {name}", current))
            elif words.get("Account") == account and "ClusterName" in words and owner in ("", *user):
                records.append((f"account {account}" + (f" user {owner}" if owner else ""), current))
            continue
        if bare in ("Account Limits", "User Limits"):
            section = bare.partition(" ")[0]
            continue
        if section:  # of one user or account of the QOS: what is used, and the limit where there is one
            heading = re.match(r"([^=\s]+?)(?:\(\d+\))?$", bare)
            if heading:
                section = section.partition(":")[0] + ":" + heading[1]
                continue
            holder, _, name = section.partition(":")
            if name in (user if holder == "User" else (account,)):
                for key, value in words.items():
                    current.setdefault(key, value)
            continue
        for key, value in words.items():
            current.setdefault(key, value)
    return records
