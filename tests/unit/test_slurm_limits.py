"""Limits of the accounting, read from what sacctmgr 22.05 has printed, and what a plan would run into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.executors.slurm import control, preflight
from nemotron_recipes.executors.slurm import limits as slurm_limits
from nemotron_recipes.executors.slurm.limits import Policy
from nemotron_recipes.executors.slurm.site import NodeKind, Partition, Site, Unreadable
from nemotron_recipes.spec import Placement
from tests.helpers.plans import probe_stage

RECORDED = Path(__file__).parents[1] / "recorded" / "slurm-22.05"  # account lab with limits, and a QOS `tight`


def _policy() -> Policy:
    def text(name: str) -> str:
        return (RECORDED / f"limits-{name}.txt").read_text()

    accounts = slurm_limits.parse_members(text("accounts"))
    mine = slurm_limits.parse_members(text("user"))
    return Policy(mine, {each.account: each for each in accounts}, slurm_limits.parse_qos(text("qos")))


def _site(own_qos: str = "") -> Site:
    none: frozenset[str] = frozenset()
    batch = Partition("batch", True, "UP", "UNLIMITED", None, 9, 1, None, None, none, None, none, own_qos)
    return Site("22.05.8", "c", frozenset({"limits"}), "", (batch,), (NodeKind(("batch",), 9, 9, 9, "", False),), None)


def test_what_22_05_has_printed() -> None:
    policy = _policy()
    mine = policy.mine[0]
    assert (mine.account, mine.user, mine.qos, mine.default_qos) == ("lab", "me", ("normal", "tight"), "")
    limits = {"MaxJobs": "7", "MaxSubmit": "9", "MaxWall": "08:00:00", "MaxTRES node": "2"}
    assert mine.holder.limits == limits
    assert policy.accounts["lab"].parent == "root"
    assert policy.accounts["lab"].holder.limits["GrpTRES mem"] == "100G"
    assert policy.qos["tight"].over
    assert policy.qos["tight"].holder.limits["MaxSubmit"] == "5"
    assert str(policy.qos["normal"].holder) == "none"


@pytest.mark.parametrize(
    ("limit", "text", "number"),
    [
        ("MaxTRES mem", "512", 512),
        ("MaxTRES mem", "1.5T", 1.5 * 1024 * 1024),
        ("GrpTRES cpu", "16", 16),
        ("MaxWall", "1-02:00:00", 93600),
    ],
)
def test_amounts(limit: str, text: str, number: float) -> None:
    assert slurm_limits.amount(limit, text) == number


@pytest.mark.parametrize(
    "text", ["lab|me|||normal\n", "lab|me|||normal||x|||||||\n", "lab|me|||n||||soon||||\n", "a|b|||n|||||cpu|||\n"]
)
def test_what_is_not_known_is_an_error_that_quotes_it(text: str) -> None:
    with pytest.raises(Unreadable):
        slurm_limits.parse_members(text)


@pytest.mark.parametrize(
    ("fields", "own_qos", "queued", "told"),
    [
        ({"time": "08:00:00", "nodes": 2, "account": "lab"}, "", 0, []),
        (
            {"time": "08:00:01", "nodes": 3, "account": "lab"},
            "",
            0,
            ["MaxWall is 08:00:00", "user me: MaxTRES node", "Grp"],
        ),
        ({"nodes": 2, "mem": "51G", "account": "lab"}, "", 0, ["account lab: GrpTRES mem is 100G"]),
        ({"account": "LAB"}, "", 7, []),
        ({"account": "lab"}, "", 8, ["MaxSubmit is 9, and this would be job 10"]),
        # What a QOS sets hides the same of the account; so a day, but one node only.
        ({"qos": "tight", "time": "1-0", "account": "lab"}, "", 0, []),
        (
            {"qos": "tight", "nodes": 2, "gpus_per_node": 2, "account": "lab"},
            "",
            0,
            ["MaxTRES node", "MaxTRESPU gres/gpu"],
        ),
        ({"time": "1-0", "nodes": 2, "account": "lab"}, "tight", 0, ["QOS tight: MaxTRES node"]),
        ({"nodes": 3}, "", 0, []),  # without an account set the other one, which has no limits, may be taken
    ],
)
def test_preflight_holds_a_plan_against_them(
    fields: dict[str, Any], own_qos: str, queued: int, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_fields = {"executor": "slurm", **fields}
    monkeypatch.setattr(control, "ask", lambda *argv: "lab|normal\nother|normal\n" * queued)
    place = Placement("slurm", "lab", fields.get("nodes", 1), 1, profile_fields)
    stages = [probe_stage(name, placement=place) for name in ("first", "second")]
    problems = [*preflight.policy_problems(stages, _site(own_qos), _policy(), "batch")]
    found = [problem.what for problem in problems if "first" in (problem.where or "") or "MaxSubmit" in problem.what]
    assert len(found) == len(told), found
    for words, what in zip(told, found, strict=True):
        assert words in what
    assert all(problem.fix and problem.where for problem in problems)


@pytest.mark.parametrize(("others", "told"), [(8, []), (9, ["MaxSubmit is 9, and this would be job 10 of this user"])])
def test_the_runs_of_a_sweep_count_together(others: int, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ask", lambda *argv: "")
    place = Placement("slurm", "lab", 1, 1, {"executor": "slurm", "account": "lab"})
    beside = [probe_stage("first", placement=place) for _ in range(others)]
    stage = probe_stage("first", placement=place)
    found = [*preflight.policy_problems([stage], _site(""), _policy(), "batch", beside)]
    assert [problem.what.partition(": ")[2] for problem in found] == told


@pytest.mark.parametrize(("gpus", "told"), [(4, 0), (1, 1), (None, 1)])
def test_a_job_that_asks_for_less_than_a_qos_wants(
    gpus: int | None, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ask", lambda *argv: "")
    few = slurm_limits.parse_qos("large||||||||||gres/gpu=4\n")
    policy = replace(_policy(), qos={**_policy().qos, **few})
    fields = {"executor": "slurm", "account": "lab", "qos": "large", "gpus_per_node": gpus}
    stage = probe_stage("first", placement=Placement("slurm", "lab", 1, 1, fields))
    found = [*preflight.policy_problems([stage], _site(""), policy, "batch")]
    assert len(found) == told
    assert all("MinTRES gres/gpu is 4 GPU(s) at least" in problem.what for problem in found)
