"""Several hosts, without any: profiles, what is rendered for each, and what is made of a network that was found."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.docker.executor import DockerExecutor
from nemotron_recipes.executors.docker.profile import DockerProfile
from nemotron_recipes.executors.docker.render import profile_of
from nemotron_recipes.executors.hosts import links, needed_files, network, preflight
from nemotron_recipes.executors.hosts.network import End, Host, Link, NoLink
from nemotron_recipes.executors.remote.transport import HERE
from nemotron_recipes.spec import Artifact, StagePlan
from tests.helpers.executor_harness import placement
from tests.helpers.plans import plan_of, probe_stage

EXECUTOR = DockerExecutor()
PAIR = {"hosts": ["localhost", "spark2"], "hosts_folder": "/copies", "network": None, "gpus": "none"}
RAILS = [
    {"name": "enp1s0f1np1", "address": "192.168.100.10", "network": "192.168.100.0/24", "speed": 200000, "hcas": []},
    {"name": "docker9", "address": "172.17.0.1", "network": "172.17.0.0/16", "speed": 10000, "hcas": []},
]


def stage_of(fields: dict[str, Any] | None = None, **orders: Any) -> StagePlan:
    own = {"launcher": "torchrun", **orders}
    return probe_stage("first", placement=placement(EXECUTOR, **{**PAIR, **(fields or {})}), **own)


def test_nodes_follow_from_hosts() -> None:
    assert DockerProfile(container_image="x", hosts=["a", "b"]).nodes == 2
    assert DockerProfile(container_image="x").nodes == 1
    with pytest.raises(ValidationError, match="as many hosts as there are nodes, 3"):
        DockerProfile(container_image="x", hosts=["a", "b"], nodes=3)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hosts": ["localhost", "-oProxyCommand=x"]}, "no name of a host"),
        ({"hosts": ["localhost", "spark2", "spark2"]}, "named twice"),
        ({"network": "bridge"}, "the hosts' own network"),
        ({"hosts_folder": "here"}, "not absolute"),
        ({"env": {"GLOO_SOCKET_IFNAME": "eth0"}}, "GLOO_SOCKET_IFNAME is set by the executor itself"),
    ],
)
def test_what_can_not_work_is_said(fields: dict[str, Any], told: str) -> None:
    (problem,) = EXECUTOR.check(dataclasses.replace(stage_of(fields), directory="/run/first"))
    assert told in problem.what
    assert problem.fix


def test_a_checkpoint_that_all_ranks_write_needs_files_that_all_hosts_see() -> None:
    stage = dataclasses.replace(stage_of(), directory="/run/first")
    together = dataclasses.replace(stage, launch=dataclasses.replace(stage.launch, writes_together=True))
    (problem,) = EXECUTOR.check(together)
    assert "write one checkpoint together" in problem.what
    shared = {**together.placement.options, "hosts_share_files": True}
    assert (
        EXECUTOR.check(dataclasses.replace(together, placement=dataclasses.replace(stage.placement, options=shared)))
        == []
    )
    remote = Artifact("wandb", "data", name="e/p/rows", revision="v1")
    (problem,) = EXECUTOR.check(dataclasses.replace(stage, inputs={"data.path": remote}))
    assert "W&B" in problem.what
    (problem,) = EXECUTOR.check(dataclasses.replace(stage_of(launcher="plain"), directory="/run/first"))
    assert "one process" in problem.what


def test_other_hosts_are_asked_although_the_daemon_of_this_one_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data prep runs here alone, and is asked about first; what is wrong here is said once for all such stages."""

    def fake_docker(*_: object) -> Iterator[Problem]:
        raise UserError(Problem("docker can't be used"))
        yield

    monkeypatch.setattr("nemotron_recipes.executors.docker.preflight.problems", fake_docker)
    monkeypatch.setattr("nemotron_recipes.executors.hosts.preflight.problems", lambda *_: [Problem("spark2: away")])
    alone = [probe_stage(name, placement=placement(EXECUTOR, container_image=name)) for name in ("prep", "pack")]
    problems = EXECUTOR.preflight(plan_of(tmp_path / "run", *alone, stage_of()))
    assert [problem.what for problem in problems] == ["docker can't be used", "spark2: away"]


def test_each_host_has_its_own_container_of_the_same_kind(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.touch()
    stage = dataclasses.replace(
        stage_of({"env": {"NCCL_IB_HCA": "mine"}}), inputs={"data.path": Artifact("path", "data", uri=str(data))}
    )
    plan = plan_of(tmp_path / "runs" / "run", stage)
    (rendered,) = EXECUTOR.render(plan).stages
    (other,) = rendered.elsewhere.values()
    differ = [(here, there) for here, there in zip(rendered.argv, other, strict=True) if here != there]
    copied = [f"type=bind,source={path},target={path}" for path in (plan.run_dir, plan.store)]
    copied += [f"type=bind,source={data},target={data},readonly"]
    assert differ == [
        *((mount, mount.replace("source=", "source=/copies", 1)) for mount in copied),
        ("PET_NODE_RANK=0", "PET_NODE_RANK=1"),
    ]
    assert rendered.argv[rendered.argv.index("--network") + 1] == "host"
    assert "--nnodes=2" in rendered.argv
    assert "NCCL_IB_HCA" not in rendered.argv, "the profile says which"
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "UCX_NET_DEVICES", "PET_MASTER_ADDR"} <= {*rendered.argv}
    (alone,) = EXECUTOR.render(plan_of(tmp_path / "r", stage_of({"hosts": []}))).stages
    assert (alone.elsewhere, alone.notes) == ({}, ())
    assert "PET_MASTER_ADDR" not in alone.argv


def test_shared_files_lie_at_the_same_paths(tmp_path: Path) -> None:
    (rendered,) = EXECUTOR.render(plan_of(tmp_path / "run", stage_of({"hosts_share_files": True}))).stages
    (other,) = rendered.elsewhere.values()
    assert [pair for pair in zip(rendered.argv, other, strict=True) if pair[0] != pair[1]] == [
        ("PET_NODE_RANK=0", "PET_NODE_RANK=1")
    ]


def test_the_environment_pins_each_host_to_its_own_end() -> None:
    here = End("enp1s0f1np1", "192.168.100.10", 200000, ("rocep1s0f1", "roceP2p1s0f1"))
    there = End("enp1s0f0np0", "192.168.100.11", 200000, ())
    first, second = network.environments([Link(here, there, (90.0, 88.0))], 61007)
    assert first["NCCL_SOCKET_IFNAME"] == first["UCX_NET_DEVICES"] == "enp1s0f1np1"
    assert first["NCCL_IB_HCA"] == "rocep1s0f1,roceP2p1s0f1"
    assert second["GLOO_SOCKET_IFNAME"] == second["TP_SOCKET_IFNAME"] == "enp1s0f0np0"
    assert "NCCL_IB_HCA" not in second
    meetings = [(each["PET_MASTER_ADDR"], each["PET_MASTER_PORT"]) for each in (first, second)]
    assert meetings == [("192.168.100.10", "61007")] * 2


class FakeNetwork:
    """A host whose interfaces and measurements are faked."""

    name = "fake"

    def __init__(self, told: list[dict[str, Any]], gbps: dict[str, float]):
        self.told, self.gbps = told, gbps

    def call(self, function: Any, *arguments: Any) -> Any:
        if function is links.interfaces:
            return self.told
        if function is links.listen:
            return [1, "token"]
        name = arguments[0]
        if name not in self.gbps:
            raise OSError(113, os.strerror(113))
        return self.gbps[name]


def fake_pair(gbps: dict[str, float], back: dict[str, float]) -> tuple[Host, Host]:
    wifi = {"name": "wlP9s9", "address": "10.0.0.1", "network": "10.0.0.0/24", "speed": 0, "hcas": []}
    own = [*RAILS, wifi]
    others = [{**each, "address": each["address"].replace(".10", ".11")} for each in RAILS]
    others += [{**wifi, "address": "10.0.0.2"}]
    first = Host("spark1", 0, FakeNetwork(own, gbps))  # type: ignore[arg-type]
    return first, Host("spark2", 1, FakeNetwork(others, back))  # type: ignore[arg-type]


def test_what_carries_most_in_its_slower_direction_is_taken() -> None:
    first, second = fake_pair({"enp1s0f1np1": 95.0, "wlP9s9": 1.2}, {"enp1s0f1np1": 0.4, "wlP9s9": 1.1})
    link = network.find_link(first, second)
    assert (link.here.name, link.gbps) == ("wlP9s9", (1.2, 1.1)), "a link that reads 200 Gb/s and carries 0.4"
    assert (
        "spark1 wlP9s9 10.0.0.1 - spark2 wlP9s9 10.0.0.2: 1.2 Gb/s, back 1.1; hosts_min_gbps is 26"
        in network.too_slow([first, second], [link], 26.0)
    )
    assert network.find_link(first, second, "enp1s0f1np1").here.name == "enp1s0f1np1"


def test_without_a_network_it_is_said_what_was_tried() -> None:
    first, second = fake_pair({}, {})
    with pytest.raises(NoLink, match="spark1 enp1s0f1np1 192.168.100.10 - spark2 .*: No route to host") as raised:
        network.find_link(first, second)
    assert "172.17.0.1" not in str(raised.value), "docker's bridge has one address everywhere"
    assert "firewall" in raised.value.fix
    second.where.told = []  # type: ignore[attr-defined]
    with pytest.raises(NoLink, match=r"no network in common \(spark1: enp1s0f1np1 192.168.100.0/24, .*spark2: none\)"):
        network.find_link(first, second)


def test_data_is_really_sent_and_counted() -> None:
    before = {*threading.enumerate()}
    port, token = links.listen("127.0.0.1")
    assert links.send("lo", "127.0.0.1", "127.0.0.1", port, token, 0.05) > 0
    port, _ = links.listen("127.0.0.1")
    with pytest.raises(OSError, match="broke off"):
        links.send("lo", "127.0.0.1", "127.0.0.1", port, "0" * 16, 0.05)
    assert all(thread.daemon for thread in {*threading.enumerate()} - before), "none keeps the machine's agent alive"


def test_rdma_devices_of_the_same_port_belong_to_an_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Spark's /sys, faked: each of two ports shows as two interfaces and devices; a cable is in the second one."""
    monkeypatch.setattr(links, "_NET", tmp_path / "net")
    monkeypatch.setattr(links, "_RDMA", tmp_path / "infiniband")
    for place, name, device, state in (
        ("0000:01:00.0", "enp1s0f0np0", "rocep1s0f0", "down"),
        ("0000:01:00.1", "enp1s0f1np1", "rocep1s0f1", "up"),
        ("0002:01:00.0", "enP2p1s0f0np0", "roceP2p1s0f0", "down"),
        ("0002:01:00.1", "enP2p1s0f1np1", "roceP2p1s0f1", "up"),
    ):
        card = tmp_path / "devices" / place
        (card / "net" / name).mkdir(parents=True)
        (card / "net" / name / "operstate").write_text(state)
        (card / "net" / name / "speed").write_text("200000")
        for folder, link in (("net", name), ("infiniband", device)):
            (tmp_path / folder / link).mkdir(parents=True)
            (tmp_path / folder / link / "device").symlink_to(card)
    assert links._hcas("enp1s0f1np1") == ["roceP2p1s0f1", "rocep1s0f1"]
    assert links.ports()[1] == ["roceP2p1s0f1", "enP2p1s0f1np1", True, "200000"]


def test_interfaces_of_this_machine_are_read() -> None:
    assert ("lo", "127.0.0.1") in links._addresses()
    assert all(each["name"] != "lo" and each["network"].count("/") == 1 for each in links.interfaces())
    assert network.is_here("localhost")
    assert not network.is_here("no-such-host.invalid")


def test_a_copy_is_stale_when_its_content_or_for_large_files_its_time_differs(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    for folder in (near, far / str(near).lstrip("/")):
        folder.mkdir(parents=True)
        (folder / "a").write_text("same")
    known = {str(near / "a"): [4, 0, needed_files.digests("", [str(near / "a")])[str(near / "a")]]}
    assert needed_files.stale(str(far), known) == []
    (far / str(near / "a").lstrip("/")).write_text("else")
    assert needed_files.stale(str(far), known) == [str(near / "a")]
    by_time = {str(near / "a"): [4, int((far / str(near / "a").lstrip("/")).stat().st_mtime), ""]}
    assert needed_files.stale(str(far), by_time) == []
    assert needed_files.stale(str(far), {str(near / "gone"): [0, 0, ""]}) == [str(near / "gone")]
    assert HERE.call(needed_files.missing, [str(near), str(near / "gone")]) == [str(near / "gone")]


def test_what_differs_between_hosts_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [Host("localhost", 0, HERE), Host("spark2", 1, HERE)]
    told, away = network.ask_all(hosts, "hosts")
    assert (away, [*network.unlike(hosts, told, "hosts")]) == ([], [])
    assert abs(told[1]["ahead"]) < 60
    told[1] = {**told[1], "uid": 4_000, "driver": "580.95.05", "ahead": -600.0}
    user, driver, clock = network.unlike(hosts, told, "hosts")
    assert user.refuses and "your user is 4000:" in user.what
    assert not driver.refuses and "driver of spark2 is 580.95.05, here it is missing" in driver.what
    assert not clock.refuses and "clock of spark2 is 600 s behind" in clock.what
    with pytest.raises(UserError, match="the first of hosts is spark1.invalid"):
        network.ask_all([Host("spark1.invalid", 0, HERE)], "hosts")


def test_a_hub_model_that_the_other_host_lacks_is_told_or_refused(tmp_path: Path) -> None:
    model = Artifact("hub", "model", "org/name", revision="c0ffee")

    def said(**fields: Any) -> list[Problem]:
        stage = dataclasses.replace(stage_of({"hf_cache": str(tmp_path), **fields}), inputs={"model.path": model})
        return [*preflight._models(Host("spark2", 1, HERE), stage, profile_of(stage))]

    (told,) = said()
    assert not told.refuses and "its ranks will fetch it" in told.what
    (refused,) = said(env={"HF_HUB_OFFLINE": "1"})
    assert refused.refuses and "HF_HUB_OFFLINE is set" in refused.what
    folder = tmp_path / "hub" / "models--org--name"
    (folder / "blobs").mkdir(parents=True)
    with open(folder / "blobs" / "weights", "wb") as file:
        file.truncate(1 << 43)  # 8 TiB, sparse
    told, room = said()
    assert "8192.0 GiB" in told.what and room.refuses and "would be fetched" in room.what
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    assert said() == []
