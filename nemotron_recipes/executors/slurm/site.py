"""What a Slurm cluster says of itself: version, partitions, nodes, this user's accounts and QOS.

The parsers are pure. They know what Slurm 20.11 to 26.05 prints; what they need and don't understand is an error that
quotes it, never a guess. Keys that they don't need may come and go.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from nemotron_recipes.errors import NemotronError
from nemotron_recipes.executors.images.enroot import architecture
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.slurm import control
from nemotron_recipes.executors.slurm.profile import limit_seconds

_NO_LIMIT = ("UNLIMITED", "INFINITE", "NONE", "(null)", "N/A")
_PARTITION_STATES = ("UP", "DOWN", "DRAIN", "INACTIVE")


class Unreadable(NemotronError):
    """Slurm printed something that the parsers don't know."""


@dataclass(frozen=True)
class Partition:
    """One partition. Limits are None where there is none; `accounts` and `qos` are None where all may use it."""

    name: str
    default: bool
    state: str  # UP, DOWN, DRAIN, INACTIVE
    max_time: str
    max_seconds: int | None
    nodes: int
    min_nodes: int
    max_nodes: int | None
    accounts: frozenset[str] | None
    denied_accounts: frozenset[str]
    qos: frozenset[str] | None
    denied_qos: frozenset[str]
    own_qos: str = ""  # whose limits hold for all jobs in it


@dataclass(frozen=True)
class NodeKind:
    """Nodes that are alike, with how many there are. memory in MB; state without what is only of the moment;
    architecture as images have it (amd64, arm64), "" of nodes that have not said theirs yet."""

    partitions: tuple[str, ...]
    cpus: int
    memory: int
    gpus: int
    gpu_type: str
    down: bool
    architecture: str = ""
    count: int = 1


@dataclass(frozen=True)
class Association:
    """An account that this user may charge, and the QOS that go with it."""

    cluster: str
    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str


@dataclass(frozen=True)
class Site:
    """All of it. enforced: what the accounting enforces; associations: None where nobody can be asked."""

    version: str
    cluster: str
    enforced: frozenset[str]
    mpi_default: str
    partitions: tuple[Partition, ...]
    nodes: tuple[NodeKind, ...]
    associations: tuple[Association, ...] | None

    def partition(self, name: str | None) -> Partition | None:
        """The one of that name; without a name the default."""
        return next((p for p in self.partitions if (p.name == name if name else p.default)), None)

    def nodes_of(self, partition: str) -> tuple[NodeKind, ...]:
        return tuple(kind for kind in self.nodes if partition in kind.partitions)

    def architectures(self, partitions: str | None) -> frozenset[str]:
        """Of the nodes in any of these partitions ("a,b"; None: the default one), as far as they have said it."""
        names = [found.name for name in (partitions or "").split(",") if (found := self.partition(name))]
        return frozenset(k.architecture for name in names for k in self.nodes_of(name) if k.architecture)

    @property
    def enforces_accounts(self) -> bool:
        return bool({"associations", "limits", "qos", "safe", "all"} & self.enforced)


def read_site() -> Site:
    """Ask Slurm, hidden partitions included.

    Unreachable: it can't be asked; Unreadable: it answers in words that are not known.
    """
    config = parse_config(control.answer("scontrol", "show", "config"))
    user = transport.call(there.user)
    fields = "format=cluster,account,partition,qos,defaultqos"
    said = control.ask("sacctmgr", "--noheader", "--parsable2", "show", "assoc", "where", f"user={user}", fields)
    found = parse_associations(said)
    cluster = _needed(config, "ClusterName")
    return Site(
        version=parse_version(_needed(config, "SLURM_VERSION")),
        cluster=cluster,
        enforced=frozenset(word.strip().lower() for word in config.get("AccountingStorageEnforce", "").split(",")),
        mpi_default=config.get("MpiDefault", ""),
        partitions=parse_partitions(control.answer("scontrol", "--all", "--oneliner", "show", "partition")),
        nodes=parse_nodes(control.answer("scontrol", "--all", "--oneliner", "show", "node")),
        associations=tuple(a for a in found if a.cluster.lower() == cluster.lower()) if said else None,
    )


def parse_version(text: str) -> str:
    """`22.05.8` of `slurm-wlm 22.05.8`, `slurm 24.05.3`, `20.11.9-ubuntu2`."""
    found = re.search(r"\b(\d\d\.\d\d(?:\.\d+)?)", text)
    if not found:
        raise Unreadable(f"no version of Slurm in {text.strip()!r}")
    return found[1]


def parse_config(text: str) -> dict[str, str]:
    """`Key = value` of `scontrol show config`."""
    found = {key: value.strip() for key, value in re.findall(r"^(\S+)\s+= ?(.*)$", text, re.MULTILINE)}
    if not found:
        raise Unreadable(f"`scontrol show config` printed no settings: {text[:200]!r}")
    return found


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """`scontrol --oneliner show partition`. Names may hold spaces."""
    if text.startswith("No partitions in the system"):
        return ()
    return tuple(_partition(line) for line in text.splitlines() if line.strip())


def parse_nodes(text: str) -> tuple[NodeKind, ...]:
    """`scontrol --oneliner show node`, those that are alike taken together."""
    if text.startswith("No nodes in the system"):
        return ()
    counted = Counter(_node(line) for line in text.splitlines() if line.strip())
    return tuple(NodeKind(*kind, count=number) for kind, number in counted.items())


def parse_associations(text: str) -> tuple[Association, ...]:
    """`sacctmgr --noheader --parsable2 show assoc ... format=cluster,account,partition,qos,defaultqos`."""
    found = []
    for line in text.splitlines():
        columns = line.split("|")
        if len(columns) != 5:
            raise Unreadable(f"sacctmgr printed {len(columns)} columns, not 5: {line!r}")
        cluster, account, partition, qos, default = columns
        found.append(Association(cluster, account, partition, tuple(q for q in qos.split(",") if q), default))
    return tuple(found)


def parse_gpus(gres: str) -> tuple[int, str]:
    """(GPUs, type) of a node's Gres: `gpu:8`, `gpu:h100:8(S:0-1)`, `gpu:a100:2,gpu:t4:2,mps:200`; (0, "") without."""
    count, kinds = 0, []
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        words = part.split(":")
        if words[0] != "gpu":
            continue
        if len(words) not in (2, 3) or not words[-1].isdecimal():
            raise Unreadable(f"GRES {gres!r} of a node")
        count += int(words[-1])
        kinds += words[1:-1]
    return count, "/".join(dict.fromkeys(kinds))


def _partition(line: str) -> Partition:
    said = _fields(line)
    state, most = _needed(said, "State"), _needed(said, "MaxNodes")
    if state not in _PARTITION_STATES:
        raise Unreadable(f"state {state!r} of a partition, in {line[:200]!r}")
    if most not in _NO_LIMIT and not most.isdecimal():
        raise Unreadable(f"MaxNodes={most} of a partition, in {line[:200]!r}")
    return Partition(
        name=_needed(said, "PartitionName"),
        default=_needed(said, "Default") == "YES",
        state=state,
        max_time=_needed(said, "MaxTime"),
        max_seconds=_seconds(_needed(said, "MaxTime")),
        nodes=_number(said, "TotalNodes"),
        min_nodes=_number(said, "MinNodes"),
        max_nodes=int(most) if most.isdecimal() else None,
        accounts=_names(said.get("AllowAccounts", "ALL")),
        denied_accounts=_names(said.get("DenyAccounts", "")) or frozenset(),
        qos=_names(said.get("AllowQos", "ALL")),
        denied_qos=_names(said.get("DenyQos", "")) or frozenset(),
        own_qos="" if said.get("QoS", "N/A") in _NO_LIMIT else said["QoS"],
    )


def _node(line: str) -> tuple[tuple[str, ...], int, int, int, str, bool, str]:
    said = _fields(line)
    state = _needed(said, "State")
    words = re.split(r"[+*~#!%$@^-]+", state)
    gpus, kind = parse_gpus(said.get("Gres", "(null)"))
    partitions = tuple(name for name in said.get("Partitions", "").split(",") if name)
    down = bool({"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FUTURE", "NOT_RESPONDING"} & {*words})
    speaks = architecture(said.get("Arch", ""))
    return partitions, _number(said, "CPUTot"), _number(said, "RealMemory"), gpus, kind, down, speaks


def _fields(line: str) -> dict[str, str]:
    """`Key=value` of one line; a value goes on to the next key, as names and system versions hold spaces."""
    pairs = re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)", line)
    found: dict[str, str] = {}
    for key, value in pairs:
        found.setdefault(key, value)
    return found


def _seconds(text: str) -> int | None:
    if text in _NO_LIMIT:
        return None
    seconds = limit_seconds(text)
    if seconds is None:
        raise Unreadable(f"time limit {text!r}")
    return seconds


def _names(text: str) -> frozenset[str] | None:
    """None: all."""
    return None if text == "ALL" else frozenset(name for name in text.split(",") if name and name != "(null)")


def _number(said: dict[str, str], key: str) -> int:
    text = _needed(said, key)
    if not text.isdecimal():
        raise Unreadable(f"{key}={text!r} is no number")
    return int(text)


def _needed(said: dict[str, str], key: str) -> str:
    if key not in said:
        raise Unreadable(f"no {key} among {', '.join([*said][:8])}, ...")
    return said[key]
