"""What Slurm prints of itself, read: as recorded on 22.05, and in the forms of older and newer versions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.executors.slurm import doctor, preflight
from nemotron_recipes.executors.slurm import site as slurm_site
from nemotron_recipes.executors.slurm.profile import SlurmProfile
from nemotron_recipes.executors.slurm.site import Association, NodeKind, Partition, Site, Unreadable
from nemotron_recipes.spec import Placement
from tests.helpers.plans import probe_stage

RECORDED = Path(__file__).parents[1] / "recorded" / "slurm-22.05"  # slurm/testcluster up --nodes 2 --gpus-per-node 2

# Older: no TRES of a partition. Newer: MaxCPUsPerSocket (23.02), ExclusiveTopo and NodeSets (24.05), Topology (25.05).
OF_20_11 = (
    "PartitionName=batch AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A "
    "DefaultTime=01:00:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED "
    "MaxTime=2-12:30:00 MinNodes=1 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[001-004] PriorityJobFactor=1 "
    "PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=512 "
    "TotalNodes=4 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED\n"
)
OF_25_05 = (
    "PartitionName=GPU nodes (large) AllowGroups=ALL AllowAccounts=llm,vision AllowQos=normal,high AllocNodes=ALL "
    "Default=NO QoS=gpu DefaultTime=NONE DisableRootJobs=YES ExclusiveUser=NO ExclusiveTopo=NO GraceTime=0 Hidden=NO "
    "MaxNodes=8 MaxTime=04:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED MaxCPUsPerSocket=UNLIMITED NodeSets=ALL "
    "Nodes=gb[01-18] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=EXCLUSIVE "
    "OverTimeLimit=NONE PreemptMode=OFF State=DRAIN TotalCPUs=2592 TotalNodes=18 SelectTypeParameters=NONE "
    "JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED Topology=block "
    "TRES=cpu=2592,mem=15T,node=18,billing=2592,gres/gpu=72,gres/gpu:gb200=72 TRESBillingWeights=CPU=1.0,Mem=0\n"
)
NODE_OF_25_05 = (
    "NodeName=gb01 Arch=aarch64 CoresPerSocket=72 CPUAlloc=0 CPUEfctv=144 CPUTot=144 CPULoad=0.10 "
    "AvailableFeatures=gb200 ActiveFeatures=gb200 Gres=gpu:gb200:4(S:0-1) NodeAddr=gb01 NodeHostName=gb01 "
    "Version=25.05.1 OS=Linux 6.8.0-1024-nvidia-64k #27-Ubuntu SMP PREEMPT_DYNAMIC Thu RealMemory=900000 AllocMem=0 "
    "FreeMem=880000 Sockets=2 Boards=1 State=IDLE+DRAIN+PLANNED ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A "
    "MCS_label=N/A Partitions=GPU nodes (large) BootTime=2026-01-01T00:00:00 Reason=a fan = broken [root@2026-01-01]\n"
)


def test_what_22_05_has_printed() -> None:
    config = slurm_site.parse_config((RECORDED / "config.txt").read_text())
    assert (config["ClusterName"], slurm_site.parse_version(config["SLURM_VERSION"])) == ("testcluster", "22.05.8")
    batch, interactive = slurm_site.parse_partitions((RECORDED / "partitions.txt").read_text())
    assert (batch.name, batch.default, batch.state, batch.max_seconds, batch.nodes) == ("batch", True, "UP", 86400, 2)
    assert (batch.max_nodes, batch.accounts, batch.qos) == (None, None, None)
    assert (interactive.default, interactive.max_seconds) == (False, 3600)
    (kind,) = slurm_site.parse_nodes((RECORDED / "nodes.txt").read_text())
    assert kind == NodeKind(("batch", "interactive"), 32, 64000, 2, "", False, "amd64", count=2)


def test_older_and_newer_forms() -> None:
    old, new = slurm_site.parse_partitions(OF_20_11 + OF_25_05)
    assert (old.max_seconds, old.min_nodes, old.nodes) == (((2 * 24 + 12) * 60 + 30) * 60, 1, 4)
    assert (new.name, new.max_nodes, new.state) == ("GPU nodes (large)", 8, "DRAIN")
    assert (new.accounts, new.qos) == (frozenset({"llm", "vision"}), frozenset({"normal", "high"}))
    (node,) = slurm_site.parse_nodes(NODE_OF_25_05)
    assert (node.partitions, node.gpus, node.gpu_type, node.down) == (("GPU nodes (large)",), 4, "gb200", True)


@pytest.mark.parametrize(
    ("text", "version"),
    [("slurm-wlm 22.05.8", "22.05.8"), ("slurm 24.05.3", "24.05.3"), ("slurm 20.11.9-ubuntu2", "20.11.9")],
)
def test_versions(text: str, version: str) -> None:
    assert slurm_site.parse_version(text) == version


@pytest.mark.parametrize(
    ("gres", "told"),
    [
        ("(null)", (0, "")),
        ("gpu:8", (8, "")),
        ("gpu:h100:8(S:0-1)", (8, "h100")),
        ("gpu:a100:2(S:0),gpu:t4:2(S:1),mps:200", (4, "a100/t4")),
        ("nvme:1", (0, "")),
    ],
)
def test_gres(gres: str, told: tuple[int, str]) -> None:
    assert slurm_site.parse_gpus(gres) == told


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (slurm_site.parse_partitions, OF_20_11.replace("State=UP", "State=SIDEWAYS")),
        (slurm_site.parse_partitions, OF_20_11.replace("MaxTime=2-12:30:00", "MaxTime=soon")),
        (slurm_site.parse_partitions, OF_20_11.replace("TotalNodes=4", "TotalNodes=many")),
        (slurm_site.parse_partitions, OF_20_11.replace("MaxNodes=UNLIMITED", "MaxNodes=2x")),
        (slurm_site.parse_partitions, "Some banner that a site prints\n" + OF_20_11),
        (slurm_site.parse_nodes, NODE_OF_25_05.replace("RealMemory=900000", "")),
        (slurm_site.parse_nodes, NODE_OF_25_05.replace("gpu:gb200:4", "gpu:gb200:lots")),
        (slurm_site.parse_associations, "c|a|p\n"),
        (slurm_site.parse_config, ""),
        (slurm_site.parse_version, "slurm next"),
    ],
)
def test_what_is_not_known_is_an_error_that_quotes_it(parse: Any, text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


LLM = frozenset({"llm"})
SITE = Site(
    version="24.05.3",
    cluster="c",
    enforced=frozenset({"associations", "qos"}),
    mpi_default="pmix",
    partitions=(
        Partition("batch", True, "UP", "04:00:00", 4 * 3600, 10, 1, 8, None, frozenset({"guests"}), None, frozenset()),
        Partition(
            "big", False, "DOWN", "UNLIMITED", None, 99, 16, None, frozenset({"llm"}), frozenset(), None, frozenset()
        ),
    ),
    nodes=(
        NodeKind(("batch",), 128, 1_000_000, 8, "h100", False, count=6),
        NodeKind(("batch",), 64, 500_000, 0, "", False, count=4),
        NodeKind(("big",), 128, 1_000_000, 8, "h100", False, count=99),
    ),
    associations=(Association("c", "llm", "", ("normal", "high"), "normal"),),
)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, []),
        ({"time": "04:00:00", "nodes": 6, "gpus_per_node": 8, "account": "llm", "qos": "high"}, []),
        ({"partition": "nope"}, ["no partition 'nope'"]),
        ({"time": "4:00:01"}, ["more than partition batch gives"]),
        ({"nodes": 9}, ["9 node(s) are asked for"]),
        ({"nodes": 7, "gpus_per_node": 8}, ["fewer than 7 node(s) with 8 GPU(s)"]),
        ({"gpus_per_node": 9, "mem": "2T"}, ["9 GPU(s), 2097152 MB"]),
        ({"cpus_per_task": 129}, ["129 CPUs"]),
        ({"account": "other"}, ["account other is not one of this user's"]),
        ({"account": "guests"}, ["refuses account guests", "not one of this user's"]),
        ({"qos": "urgent"}, ["QOS urgent does not go with account"]),
        ({"partition": "big", "account": "vision", "nodes": 16}, ["is DOWN", "does not take account", "not one of"]),
        ({"python": "/no/such/python", "time": "9-0"}, ["more than partition batch", "no interpreter"]),
        ({"container_image": "/no/such.sqsh", "mounts": ["/no/such:/data"]}, ["no image", "no /no/such to mount"]),
    ],
)
def test_preflight_names_everything_at_once(fields: dict[str, Any], told: list[str]) -> None:
    profile = SlurmProfile(**fields)
    place = Placement("slurm", "lab", profile.nodes, 1, profile.model_dump())
    problems = list(preflight.stage_problems(probe_stage("sft", placement=place), profile, SITE, "batch", "/"))
    assert len(problems) == len(told)
    for problem, words in zip(problems, told, strict=True):
        assert words in problem.what
        assert problem.fix
        assert problem.where


def test_accounts_that_nobody_enforces_are_not_checked() -> None:
    profile = SlurmProfile(account="other")
    stage = probe_stage("sft", placement=Placement("slurm", "lab", 1, 1, profile.model_dump()))
    for site in (replace(SITE, enforced=frozenset({"none"})), replace(SITE, associations=None)):
        assert list(preflight.stage_problems(stage, profile, site, "batch", "/")) == []


def test_without_slurm_the_doctor_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "s3cr3t")
    found = doctor.examine(SlurmProfile())
    assert found.findings[0].state == "problem"
    assert "login node" in found.findings[0].text
    assert "s3cr3t" not in repr(found)
    assert ("HF_TOKEN", "set") in [(finding.topic, finding.text) for finding in found.findings]
