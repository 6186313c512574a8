"""Several machines as one: how each is reached, and the network between them, found and measured.

The first host is this machine, where the run folder lies; the others are reached by the user's own ssh.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nemotron_recipes.errors import NemotronError, Problem, UserError
from nemotron_recipes.executors.docker.profile import HCA_ENV, LINK_ENV, MEETING_ENV, DockerProfile
from nemotron_recipes.executors.hosts import links
from nemotron_recipes.executors.remote.ssh import Remote, connection
from nemotron_recipes.executors.remote.ssh_login import Login
from nemotron_recipes.executors.remote.transport import Here, Transport, Unreachable
from nemotron_recipes.spec import Tree

MEASURE_SECONDS = 1.0
SKEW_SECONDS = 5.0  # an answer over ssh takes less; a stall is judged by minutes


class NoLink(NemotronError):
    """The hosts can't work together over any network; the text says what was tried."""

    def __init__(self, message: str, fix: str = ""):
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True)
class Host:
    """One of a run's machines. `root` is the folder there below which copies lie, by their paths here; "" for none."""

    name: str
    node: int
    where: Transport = field(compare=False)
    root: str = ""

    def place(self, path: str) -> str:
        """Where a path of this machine lies there."""
        return f"{self.root}{path}" if self.root else path


@dataclass(frozen=True)
class End:
    """One host's end of the link between two: interface, its address, link speed (Mb/s), RDMA devices beside it."""

    name: str
    address: str
    speed: int
    hcas: tuple[str, ...]


@dataclass(frozen=True)
class Link:
    """Between the first host and another one: what TCP carried there and back, in Gb/s."""

    here: End
    there: End
    gbps: tuple[float, float]

    @property
    def slower(self) -> float:
        return min(self.gbps)

    def words(self, here: str, there: str) -> str:
        speed = f", link {self.here.speed / 1000:g} Gb/s" if self.here.speed else ""
        told = f"{here} {self.here.name} {self.here.address} - {there} {self.there.name} {self.there.address}"
        return f"{told}: {self.gbps[0]:.1f} Gb/s, back {self.gbps[1]:.1f}{speed}"


def of_profile(profile: DockerProfile) -> list[Host]:
    """The hosts of a profile, this machine first; it alone where none are named. Connects to none."""
    names = profile.hosts or [socket.gethostname()]
    root = "" if profile.hosts_share_files else folder_of(profile)
    found = [Host(names[0], 0, Here())]
    for node, name in enumerate(names[1:], 1):
        login = Login(name, config=profile.ssh_config, python=profile.remote_python)
        found.append(Host(name, node, Remote(connection(login)), root))
    return found


def of_options(options: Tree) -> list[Host]:
    """The same of a placement's options."""
    return of_profile(DockerProfile.model_validate(options))


def folder_of(profile: DockerProfile) -> str:
    """Below which copies lie on the other hosts; `~` is the home here, which is the same where users are alike."""
    return os.path.abspath(os.path.expanduser(profile.hosts_folder))


def to_tree(hosts: Sequence[Host]) -> list[Tree]:
    """For a run's handle: what `from_tree` needs to find the other hosts again."""
    return [
        {"name": host.name, "root": host.root, "login": asdict(host.where.connection.login)}
        for host in hosts
        if isinstance(host.where, Remote)
    ]


def from_tree(first: str, trees: Sequence[Tree]) -> list[Host]:
    """The inverse, with this machine, by that name, as the first."""
    found = [Host(first, 0, Here())]
    for node, tree in enumerate(trees, 1):
        login = Login(**{each.name: tree["login"][each.name] for each in fields(Login)})
        found.append(Host(tree["name"], node, Remote(connection(login)), tree["root"]))
    return found


def is_here(name: str) -> bool:
    """Whether a host's name means this machine."""
    bare = name.rpartition("@")[2]
    if bare in ("localhost", socket.gethostname(), socket.gethostname().partition(".")[0]):
        return True
    return bool(set(links.resolved(bare)) & set(links.own_addresses()))


def ask_all(hosts: Sequence[Host], where: str) -> tuple[dict[int, Tree], list[Problem]]:
    """node -> what it says of itself (`links.me`, and `ahead`: by how many seconds its clock is); who can't be asked.

    UserError: the first host is no name of this machine, so that nothing could be said of the run.
    """
    first, *others = hosts
    if not is_here(first.name):
        what = f"the first of hosts is {first.name}, and this machine is {socket.gethostname()}"
        fix = f"start the run on {first.name}, or name this machine first (localhost will do)"
        raise UserError(Problem(what, where, fix))
    told, problems = {0: {**links.me(), "ahead": 0.0}}, []
    for host in others:
        try:
            host.where.call(links.me)  # opens the connection, which takes its time
            before = time.time()
            said = host.where.call(links.me)
        except Unreachable as error:
            problems.append(Problem(str(error), where, error.fix))
            continue
        told[host.node] = {**said, "ahead": said["time"] - (before + time.time()) / 2}
    return told, problems


def unlike(hosts: Sequence[Host], told: Mapping[int, Tree], where: str) -> Iterator[Problem]:
    """What is not the same on those that answered: user; driver and clock, which are told and refuse nothing."""
    own = told[0]
    for host in hosts[1:]:
        said = told.get(host.node, own)
        if (said["uid"], said["gid"]) != (own["uid"], own["gid"]):
            what = f"your user is {said['uid']}:{said['gid']} on {host.name} and {own['uid']}:{own['gid']} here"
            yield Problem(what, where, "use the same one on all hosts (useradd --uid): files belong to it")
        if said["driver"] != own["driver"]:
            there, here = (each["driver"] or "missing" for each in (said, own))
            what = f"the GPU driver of {host.name} is {there}, here it is {here}"
            yield Problem(what, where, "update both: NCCL and CUDA may disagree about what they can do", refuses=False)
        if abs(said["ahead"]) > SKEW_SECONDS:
            what = (
                f"the clock of {host.name} is {abs(said['ahead']):.0f} s {'ahead' if said['ahead'] > 0 else 'behind'}"
            )
            fix = "set both by NTP (timedatectl set-ntp true): logs and heartbeats of its ranks carry its time"
            yield Problem(what, where, fix, refuses=False)


def find_link(first: Host, other: Host, wanted: str | None = None, seconds: float = MEASURE_SECONDS) -> Link:
    """The fastest network between the two, by what TCP carries now. NoLink; Unreachable: the other host itself.

    Every pair of interfaces in one network is tried: link speeds alone don't tell, and neither do names.
    """
    own, others = (host.where.call(links.interfaces) for host in (first, other))
    if wanted is not None and wanted not in [found["name"] for found in own]:
        known = ", ".join(f"{found['name']} ({found['address']})" for found in own)
        raise NoLink(f"{first.name} has no interface {wanted} that is up and has an address", f"it has: {known}")
    found, failed = [], []
    for here, there in _pairs(own, others, wanted):
        tried = f"{first.name} {here['name']} {here['address']} - {other.name} {there['name']} {there['address']}"
        try:
            gbps = (
                _measured(first, here, other, there, seconds),
                _measured(other, there, first, here, seconds),
            )
        except OSError as error:
            failed.append(f"{tried}: {error.strerror or error}")
            continue
        found.append(Link(_end(here), _end(there), gbps))
    if found:
        return max(found, key=lambda link: link.slower)
    if failed:
        fix = "look for a firewall between them: a run uses ports that it finds free"
        raise NoLink(f"{first.name} and {other.name} don't reach each other: {'; '.join(failed)}", fix)
    seen = "; ".join(f"{host.name}: {_networks(told)}" for host, told in ((first, own), (other, others)))
    fix = "give the interfaces between them addresses in one network (for a Spark: NVIDIA's Connect Two Sparks)"
    raise NoLink(f"{first.name} and {other.name} have no network in common ({seen})", fix)


def find_links(hosts: Sequence[Host], wanted: str | None = None) -> list[Link]:
    """From the first host to each other one, all by one interface of it. NoLink; Unreachable."""
    first, *others = hosts
    found = []
    for other in others:
        found.append(find_link(first, other, wanted))
        wanted = wanted or found[0].here.name  # the rendezvous has one address
    return found


def too_slow(hosts: Sequence[Host], found: Sequence[Link], least: float) -> str:
    """Which link carries less than `least` Gb/s; "" when none does."""
    for host, link in zip(hosts[1:], found, strict=True):
        if link.slower < least:
            return f"{link.words(hosts[0].name, host.name)}; hosts_min_gbps is {least:g}"
    return ""


def environments(found: Sequence[Link], port: int) -> list[dict[str, str]]:
    """Per host, the first one first: what pins the collectives to the link, and where torchrun's agents meet."""
    ends = [found[0].here, *(link.there for link in found)]
    meeting = dict(zip(MEETING_ENV, (found[0].here.address, str(port)), strict=True))
    return [
        {**dict.fromkeys(LINK_ENV, end.name), **({HCA_ENV: ",".join(end.hcas)} if end.hcas else {}), **meeting}
        for end in ends
    ]


def _pairs(
    own: Sequence[Tree], others: Sequence[Tree], wanted: str | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Ends in one network with two addresses; one address on both is a bridge that every machine has."""
    for here in own:
        for there in others:
            fits = here["network"] == there["network"] and here["address"] != there["address"]
            if fits and wanted in (None, here["name"]):
                yield here, there


def _networks(told: Sequence[Tree]) -> str:
    return ", ".join(f"{each['name']} {each['network']}" for each in told) or "none"


def _measured(sender: Host, source: Tree, receiver: Host, target: Tree, seconds: float) -> float:
    port, token = receiver.where.call(links.listen, target["address"])
    ends = (source["name"], source["address"], target["address"])
    return float(sender.where.call(links.send, *ends, port, token, seconds))


def _end(told: Tree) -> End:
    return End(told["name"], told["address"], told["speed"], tuple(told["hcas"]))
