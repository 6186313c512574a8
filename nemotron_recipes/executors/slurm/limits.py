"""What the accounting allows: the limits of QOS, accounts and this user, and which of them a job would run into.

`rules` and the parsers are pure. The order in which limits hold, and which hides which:
https://slurm.schedmd.com/resource_limits.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.slurm import control
from nemotron_recipes.executors.slurm.profile import limit_seconds
from nemotron_recipes.executors.slurm.site import Site, Unreadable

# What sacctmgr is asked for. The limits of a QOS for one user (PU) are those of an association.
_OF_ASSOCIATION = ("account", "user", "partition", "parentname", "qos", "defaultqos")
_OF_QOS = ("name", "flags")
_ASSOCIATION_LIMITS = ("MaxJobs", "MaxSubmit", "MaxWall", "MaxTRES", "GrpJobs", "GrpSubmit", "GrpTRES")
_QOS_LIMITS = (
    *("MaxJobsPU", "MaxSubmitPU", "MaxWall", "MaxTRES", "MaxTRESPU", "GrpJobs", "GrpSubmit", "GrpTRES"),
    "MinTRES",
)
_SAME = {"MaxJobsPU": "MaxJobs", "MaxSubmitPU": "MaxSubmit"}


@dataclass(frozen=True)
class Holder:
    """A QOS, an account, or a user of an account, with its limits.

    limits   name -> as sacctmgr prints it; of TRES one each, `MaxTRES node`. Of associations, what is set for the
             account is in Max... of its users already
    """

    name: str
    limits: Mapping[str, str]

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.limits.items()) or "none"


@dataclass(frozen=True)
class Qos:
    """A QOS. over: its limits hide those of the partition's own QOS, not the other way round."""

    holder: Holder
    over: bool


@dataclass(frozen=True)
class Member:
    """An association: of an account (user "") or of a user of it, in one partition or in all ("")."""

    holder: Holder
    account: str
    user: str
    partition: str
    parent: str
    qos: tuple[str, ...]
    default_qos: str


@dataclass(frozen=True)
class Policy:
    """All of them."""

    mine: tuple[Member, ...]
    accounts: Mapping[str, Member]
    qos: Mapping[str, Qos]


@dataclass(frozen=True)
class Rule:
    """One limit that holds for a job: `value` in the unit of `amount`; `text` as Slurm writes it."""

    holder: str
    limit: str
    text: str
    value: float


def enforced(site: Site) -> bool:
    """Whether slurmctld holds jobs to limits: AccountingStorageEnforce has limits, or what implies it."""
    return bool({"limits", "safe", "all"} & site.enforced)


def read_policy(site: Site) -> Policy | None:
    """Ask sacctmgr; None where it knows nothing of this user, or can't be asked. Unreadable: not known words."""

    def ask(*words: str) -> str:
        return control.ask("sacctmgr", "--noheader", "--parsable2", "show", *words)

    columns = ",".join((*_OF_ASSOCIATION, *_ASSOCIATION_LIMITS)).lower()
    where = ("assoc", "where", f"cluster={site.cluster.lower()}")
    mine = ask(*where, f"user={transport.call(there.user)}", f"format={columns}")
    accounts = ask(*where, "user=", f"format={columns}")  # an empty name: the accounts' own
    qos = ask("qos", f"format={','.join((*_OF_QOS, *_QOS_LIMITS)).lower()}")
    if not (mine and accounts and qos):
        return None
    return Policy(parse_members(mine), {each.account: each for each in parse_members(accounts)}, parse_qos(qos))


def parse_members(text: str) -> tuple[Member, ...]:
    """`sacctmgr show assoc` with the columns of `read_policy`."""
    found = []
    for said, limits in _rows(text, _OF_ASSOCIATION, _ASSOCIATION_LIMITS):
        account, user, partition, parent, qos, default = said
        name = f"account {account}" + (f", user {user}" if user else "")
        names = tuple(each for each in qos.split(",") if each)
        found.append(Member(Holder(name, limits), account, user, partition, parent, names, default))
    return tuple(found)


def parse_qos(text: str) -> dict[str, Qos]:
    """`sacctmgr show qos` with the columns of `read_policy`."""
    rows = _rows(text, _OF_QOS, _QOS_LIMITS)
    return {
        name: Qos(Holder(f"QOS {name}", limits), "OverPartQOS" in flags.split(",")) for (name, flags), limits in rows
    }


def rules(policy: Policy, member: Member, qos: str | None, partition_qos: str | None) -> Iterator[Rule]:
    """The limits that hold for a job of `member`; what a QOS sets hides the same of the account.

    qos             what the job asks for; None: what it gets without asking
    partition_qos   the partition's own
    """
    own = qos or member.default_qos or (member.qos[0] if len(member.qos) == 1 else "normal")
    both = [policy.qos[name] for name in (partition_qos or "", own) if name in policy.qos]
    if both and both[-1].over:
        both.reverse()
    hidden: set[str] = set()
    for each in both:
        yield from _rules(each.holder, hidden)
        hidden |= {*each.holder.limits}
    yield from _rules(member.holder, hidden)
    account = policy.accounts.get(member.account)
    seen: set[str] = set()
    while account is not None and account.account not in seen:
        seen.add(account.account)
        of_users = {key for key in account.holder.limits if key.startswith("Max")}
        yield from _rules(account.holder, hidden | of_users)
        account = policy.accounts.get(account.parent)


def amount(limit: str, text: str) -> float:
    """A limit as a number: seconds of MaxWall, MB of memory, else how many."""
    if limit == "MaxWall":
        seconds = limit_seconds(text)
        if seconds is None:
            raise Unreadable(f"{limit} {text!r} of the accounting")
        return seconds
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTPE]?)", text)
    if not found:
        raise Unreadable(f"{limit} {text!r} of the accounting")
    factor = 1024.0 ** ("KMGTPE".find(found[2]) + 1 if found[2] else 0)
    in_mb = 1024.0**2 if limit.endswith(" mem") and found[2] else 1.0
    return float(found[1]) * factor / in_mb


def _rules(holder: Holder, hidden: set[str]) -> Iterator[Rule]:
    for limit, text in holder.limits.items():
        if limit not in hidden:
            yield Rule(holder.name, limit, text, amount(limit, text))


def _rows(text: str, columns: tuple[str, ...], limits: tuple[str, ...]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """(columns, limits that are set) of each line."""
    for line in text.splitlines():
        words = line.split("|")
        if len(words) != len(columns) + len(limits):
            raise Unreadable(f"sacctmgr printed {len(words)} columns, not {len(columns) + len(limits)}: {line!r}")
        found: dict[str, str] = {}
        for name, value in zip(limits, words[len(columns) :], strict=True):
            if "TRES" not in name:
                found |= {_SAME.get(name, name): value} if value else {}
                continue
            for part in filter(None, value.split(",")):
                resource, equals, number = part.partition("=")
                if not equals:
                    raise Unreadable(f"{name} {value!r} of the accounting")
                found[f"{name} {resource}"] = number
        for name, value in found.items():
            amount(name, value)
        yield words[: len(columns)], found
