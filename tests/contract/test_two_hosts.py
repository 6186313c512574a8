"""One run on two hosts: two network namespaces with a real dockerd each, real ssh between them, two real networks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.rundir import RunDir
from tests.helpers import docker, two_hosts

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def pair() -> Iterator[two_hosts.Pair]:
    two_hosts.require()
    with two_hosts.pair() as made:
        yield made


def run(
    pair: two_hosts.Pair, folder: Path, what: str = "run", fields: dict[str, Any] | None = None, **orders: Any
) -> Any:
    """(how it ended, its events, its stage's folder)."""
    profile = json.dumps(pair.profile(**(fields or {})))
    done = pair.python(folder, "-m", "tests.helpers.hosts_run", what, str(folder / "run"), profile, json.dumps(orders))
    state, *events = json.loads(done.stdout.splitlines()[-1])
    return state, events, RunDir(folder / "run").stage("first")


def test_two_hosts_work_as_one_and_outlast_a_short_cut(pair: two_hosts.Pair, tmp_path: Path) -> None:
    strangers = [daemon.docker("create", docker.IMAGE, "true").strip() for daemon in pair.daemons]
    state, events, stage = run(pair, tmp_path, "flap", lines=-1)
    assert (state, events[-1]) == ("ended", {"event": "finished", "state": "succeeded"}), events
    (linked,) = [event for event in events if event["event"] == "linked"]
    assert "localhost fast0 10.88.1.1 - second fast0 10.88.1.2" in linked["links"][0]
    told = [json.loads((stage.logs(1) / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(each["RANK"], each["WORLD_SIZE"], each["MASTER_ADDR"]) for each in told] == [
        ("0", "2", "10.88.1.1"),
        ("1", "2", "10.88.1.1"),
    ]
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES")
    assert {each[name] for each in told for name in names} == {"fast0"}
    assert stage.ranks_with_logs(1) == [0, 1], "what a rank of the other host writes comes here"
    assert "line 1 of rank 1" in stage.log(1, 1).read_text()
    assert "probe: on stdout" in stage.launcher_log(1, 1).read_text()
    assert [pair.containers(host) for host in (0, 1)] == [[id_[:12]] for id_ in strangers], "only our own are touched"
    assert not [path for path in pair.copies.rglob("*") if path.name == "run"], "no copy of the run's folder is left"
    for daemon, stranger in zip(pair.daemons, strangers, strict=True):
        daemon.docker("rm", stranger)


def test_what_would_not_work_is_refused_before_anything_starts(pair: two_hosts.Pair, tmp_path: Path) -> None:
    pair.daemons[0].docker("tag", docker.IMAGE, "nemotron-test:here")
    pair.daemons[0].docker("tag", docker.IMAGE, "nemotron-test:both")
    pair.daemons[1].import_image("nemotron-test:both", "ENV OTHER=1")
    (tmp_path / "known_hosts").touch()
    stranger = tmp_path / "ssh_config"
    text = (pair.folder / "ssh_config").read_text()
    stranger.write_text(text.replace(f"{pair.folder}/known_hosts", f"{tmp_path}/known_hosts"))
    cases: list[tuple[dict[str, Any], list[str]]] = [
        (
            {"hosts_interface": "slow0"},  # and else nothing
            ["localhost slow0 10.88.2.1 - second slow0 10.88.2.2: 0.", "hosts_min_gbps is 0.2"],
        ),
        (
            {
                "hosts": ["localhost", "second", "third.invalid"],
                "hosts_interface": "wlan0",
                "container_image": "nemotron-test:here",
                "hosts_folder": "/proc/x",
                "mounts": [f"{tmp_path}:/x", f"{tmp_path}/gone:/y"],
            },
            [
                *("localhost has no interface wlan0", "fast0 (10.88.1.1), slow0"),
                *(
                    "second: image nemotron-test:here is not",
                    "docker pull",
                    f"second: {tmp_path}/gone of mounts is not there",
                ),
                *("second: ", "/proc", "hosts_folder"),
                *("third.invalid can't be reached", "name is not known"),
            ],
        ),
        (
            {"hosts_interface": "wlan0", "container_image": "nemotron-test:both", "hosts_share_files": True},
            ["nemotron-test:both on second is sha256:", "ssh second docker"],
        ),
        (
            {"hosts": ["second", "localhost"]},
            ["the first of hosts is second", "localhost will do"],
        ),
        ({"ssh_config": str(stranger)}, ["second can't be reached: its host key is not known", "log in once by hand"]),
    ]
    copies = {"hosts_folder": str(tmp_path / "copies")}
    fields = [json.dumps(pair.profile(**{**copies, **case})) for case, _ in cases]
    found = pair.python(tmp_path, "-m", "tests.helpers.hosts_run", "preflight", *fields).stdout.splitlines()
    assert len(json.loads(found[0])) == 1
    for (case, wanted), problems in zip(cases, found, strict=True):
        assert all(words in problems for words in wanted), (case, problems)
    assert [pair.containers(host) for host in (0, 1)] == [[], []]
    assert not (tmp_path / "copies").exists()


@pytest.mark.long
@pytest.mark.parametrize(("what", "state", "last"), [("cancel", "ended", "cancelled"), ("kill", "lost", "linked")])
def test_a_long_copy_is_given_up(pair: two_hosts.Pair, tmp_path: Path, what: str, state: str, last: str) -> None:
    large = tmp_path / "rows.jsonl"
    with open(large, "wb") as file:
        file.truncate(4 << 30)  # minutes, over the network that ssh takes
    how, events, _ = run(pair, tmp_path, what, input=str(large))
    assert (how, events[-1]["event"]) == (state, last)
    assert not Path(f"{pair.copies}{tmp_path}/run").exists(), "no copy of the run's folder is left"
    assert Path(f"{pair.copies}{large}").stat().st_size < large.stat().st_size
    assert [pair.containers(host) for host in (0, 1)] == [[], []]


@pytest.mark.long  # the limit is tested on faked containers, too
def test_a_cut_cable_ends_both_although_ssh_still_works(pair: two_hosts.Pair, tmp_path: Path) -> None:
    try:
        state, events, _ = run(pair, tmp_path, "cut", {"hosts_lost_seconds": 2.0}, sleep=600)
    finally:
        pair.bring_up()
    (down,) = [event for event in events if event["event"] == "link-down"]
    assert "fast0 is down" in down["words"]
    assert (state, events[-1]["state"], events[-1]["scheduler"]) == ("ended", "failed", "NETWORK")
    assert "the network between the hosts was gone for" in events[-1]["cause"]
    assert "localhost: fast0 is down" in events[-1]["cause"]
    assert "second: fast0 is down" in events[-1]["cause"]
    assert [pair.containers(host) for host in (0, 1)] == [[], []]


@pytest.mark.long
def test_hosts_that_share_their_files_copy_none(pair: two_hosts.Pair, tmp_path: Path) -> None:
    """Both namespaces see the same file system."""
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    fields = {"hosts_share_files": True, "hosts_folder": str(tmp_path / "copies"), "secrets": []}
    state, events, stage = run(pair, tmp_path, fields=fields, input=str(data), lines=2)
    assert (state, events[-1]["state"]) == ("ended", "succeeded"), events
    assert stage.ranks_with_logs(1) == [0, 1]
    assert (stage.path / "received-1.json").exists(), "what the other one writes is here at once, all of it"
    assert not (tmp_path / "copies").exists()


@pytest.mark.long  # whose failure it was is tested on faked containers, too
def test_one_that_fails_ends_both_and_is_named(pair: two_hosts.Pair, tmp_path: Path) -> None:
    state, events, _ = run(pair, tmp_path, signal=9, failing_rank="1")
    (exited,) = [event for event in events if event["event"] == "stage-exited"]
    assert (state, exited["host"], exited["rank"], exited["rank_exit_code"]) == ("ended", "second", 1, 137)
    assert events[-1]["state"] == "failed"
    assert events[-1]["cause"].startswith("second: rank 1 ended with exit code 137 (SIGKILL")
    assert "launcher.node-1.log" in events[-1]["cause"], "where it stands"
    assert [pair.containers(host) for host in (0, 1)] == [[], []]


@pytest.mark.long
def test_what_starts_on_one_host_alone_is_taken_back(pair: two_hosts.Pair, tmp_path: Path) -> None:
    pair.daemons[1].docker("rmi", docker.IMAGE)
    try:
        _, events, _ = run(pair, tmp_path)
        assert events[-1]["cause"].startswith("second: docker can't start it:")
        assert [pair.containers(host) for host in (0, 1)] == [[], []]
    finally:
        pair.daemons[1].docker("load", "--input", str(pair.folder / "image.tar"))


@pytest.mark.long
def test_the_doctor_looks_at_both_and_at_what_joins_them(pair: two_hosts.Pair, tmp_path: Path) -> None:
    pair.write_profile(tmp_path)
    found = {
        each["topic"]: each for each in json.loads(pair.nemotron(tmp_path, "doctor", "pair", "--json"))["findings"]
    }
    for host, daemon in zip(("localhost", "second"), pair.daemons, strict=True):
        assert daemon.host in found[f"{host}: docker"]["text"]
        assert found[f"{host}: image"]["state"] == "ok"
        assert "GiB available" in found[f"{host}: memory"]["text"]
    assert found["second: copies"] == {"topic": "second: copies", "state": "ok", "text": f"below {pair.copies}"}
    assert found["localhost - second"]["state"] == "ok"
    assert "localhost fast0 10.88.1.1 - second fast0 10.88.1.2" in found["localhost - second"]["text"]
