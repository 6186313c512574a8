"""The mirror in W&B: the real SDK against FakeWandb. The same graph and curves, once, whatever interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import UserError
from nemotron_recipes.mirror import pull, sync
from nemotron_recipes.mirror.journal import Journal, pending
from nemotron_recipes.mirror.names import named
from nemotron_recipes.mirror.telling import Teller
from nemotron_recipes.rundir import RunDir, append_event
from tests.helpers.cli import nemotron
from tests.helpers.fake_wandb import KEY, FakeWandb
from tests.helpers.mirrored import ROOT, STEPS, a_run, wandb, whole

pytest.importorskip("wandb")
__all__ = ["wandb"]


def test_a_run_is_mirrored_once_and_runs_share_versions(wandb: FakeWandb, tmp_path: Path) -> None:
    journal = a_run(tmp_path)
    outcome = sync.replay(journal.run_dir)
    assert (outcome.told, outcome.left, outcome.why) == (6, 0, "")
    whole(wandb)
    model = wandb.named("ModelArtifact-sft:v0")
    assert [alias for alias in model.aliases if alias.startswith("model.v1.")]
    facts = json.loads(model.metadata)
    store = Store(tmp_path / "store")
    assert facts["digest"] == store.resolve("model").digest and facts["uri"] == store.resolve("model").uri
    assert facts["metadata"] == {"tokens": 12} and "latest" in model.aliases
    assert wandb.runs["run-1.sft"].config["optimizer"] == {"value": {"lr": 0.1}}
    requests = len(wandb.artifacts)
    journal.done_file.unlink()  # as if no acknowledgement had ever reached the disk
    assert sync.replay(journal.run_dir).left == 0
    whole(wandb)
    assert len(wandb.artifacts) == requests, "told twice is told once"

    again = a_run(tmp_path, "run-2")
    plan = RunDir(again.run_dir).plan
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "sweep": "sweep-1"}))
    store.alias("model", "best", 2)
    assert sync.replay(again.run_dir).left == 0
    whole(wandb, "run-2", version=1, group="sweep-1")
    assert wandb.named("ModelArtifact-sft:best").number == 1
    assert not any(b"x of" in blob for blob in wandb.blobs.values()), "references, no uploads"


@pytest.mark.parametrize("of", [2, pytest.param(1000, marks=pytest.mark.long)], ids=["some", "all"])
def test_a_lost_answer_or_a_killed_process_at_a_request(wandb: FakeWandb, tmp_path: Path, of: int) -> None:
    """The connection is cut when W&B has done what it was asked, or the process dies: at each request in turn."""
    reference = a_run(tmp_path / "reference")
    sync.replay(reference.run_dir)
    count = len(wandb.asked)
    points = range(max(1, count // (of + 1)), count, max(1, count // (of + 1)))
    for number, point in enumerate(points[:of]):
        journal = a_run(tmp_path / f"cut-{point}", f"run-{point}")
        if number % 2:
            wandb.cut_at = point
        else:
            _kill_at(wandb, journal, point)
        outcomes = [sync.replay(journal.run_dir)]
        wandb.cut_at = None  # there may have been fewer requests than the first time
        outcomes.append(sync.replay(journal.run_dir))
        assert (outcomes[-1].left, outcomes[-1].why) == (0, ""), f"request {point}: {outcomes}"
        edges = {edge[:2] for edge in wandb.edges() if edge[1].startswith(f"run-{point}.")}
        assert len(edges) == 4, f"request {point}"
        history = wandb.runs[f"run-{point}.sft"].history
        assert [history[n]["_step"] for n in sorted(history)] == list(range(1, STEPS + 1)), f"request {point}"


def _kill_at(server: FakeWandb, journal: Journal, point: int) -> None:
    """SIGKILL a replay, its SDK's service included, when the server has had `point` requests more."""
    process = subprocess.Popen([sys.executable, "-m", sync.MODULE, str(journal.run_dir)], start_new_session=True)
    server.wait_for(point, process)
    with suppress(ProcessLookupError):  # it was done already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"down": True}, ""),
        ({"refuse_key": True}, "credentials"),
        pytest.param({"delay": 60.0}, "did not answer for 3 s", marks=pytest.mark.long),
    ],
)
def test_wandb_that_fails_leaves_the_journal_for_later(
    wandb: FakeWandb, tmp_path: Path, fault: dict[str, Any], text: str
) -> None:
    journal = a_run(tmp_path)
    for name, value in fault.items():
        setattr(wandb, name, value)
    outcome = sync.replay(journal.run_dir, stall=60 if "refuse_key" in fault else 3)
    assert outcome.left == 6 and outcome.why and text in outcome.why
    assert KEY not in outcome.why
    for name in fault:
        setattr(wandb, name, False if name != "delay" else 0.0)
    assert sync.replay(journal.run_dir).left == 0
    whole(wandb)


@pytest.mark.long
@pytest.mark.parametrize("status", [429, 503])
def test_wandb_that_asks_to_wait_is_told_in_the_end(wandb: FakeWandb, tmp_path: Path, status: int) -> None:
    journal = a_run(tmp_path)
    wandb.failing = (status, 2)
    outcomes = [sync.replay(journal.run_dir)]
    while outcomes[-1].left and len(outcomes) < 4:
        assert "try again later" in outcomes[-1].why or str(status) in outcomes[-1].why
        outcomes.append(sync.replay(journal.run_dir))
    assert wandb.failing is None and outcomes[-1].why == ""
    whole(wandb)


def test_a_run_that_wandb_refuses_holds_up_only_what_reads_it(wandb: FakeWandb, tmp_path: Path) -> None:
    refused, reader, free = (a_run(tmp_path, f"run-{n}") for n in (1, 2, 3))
    for number, journal in enumerate((refused, reader, free), 1):
        os.utime(journal.run_dir / "plan.json", (number, number))
    rows = Store(tmp_path / "store").resolve("rows:v1")
    reader.started("sft", 2, [{"input": "data.path", **asdict(rows)}])
    wandb.refuse = ("CreateArtifact", "run-1.")
    told = {outcome.run: outcome for outcome in sync.replay_all(tmp_path)}
    assert told["run-1"].why.startswith("output rows:v1: ") and "storage quota exceeded" in told["run-1"].why
    assert refused.missing()[0]["key"] == "output rows:v1" and told["run-1"].left == 5, "it stays for the next time"
    assert told["run-2"].why == "waits for run-1, which made what it reads" and not reader.done()
    assert (told["run-3"].why, told["run-3"].left) == ("", 0)
    whole(wandb, "run-3")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux says what a process has written")
def test_traffic_is_progress_and_so_is_an_acknowledgement(tmp_path: Path) -> None:
    """By the clock that the test gives: an upload goes on for longer than anything is acknowledged."""
    journal = a_run(tmp_path)
    line = "import sys\nfor n in sys.stdin: print('x' * int(n), flush=True)"
    child = subprocess.Popen(
        [sys.executable, "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert child.stdin is not None and child.stdout is not None

    def writes(count: int) -> None:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b"%d\n" % count)
        child.stdin.flush()
        child.stdout.readline()

    try:
        writes(1)
        progress = sync.Progress(child.pid, journal, 120.0, now=0.0)
        for now in (100.0, 200.0, 300.0):
            writes(sync.LEAST_TRAFFIC * 120)
            assert not progress.is_over(now)
        writes(5000)  # it asks once more
        assert not progress.is_over(419.0)
        journal.acknowledge("started sft 1")
        assert not progress.is_over(419.5) and not progress.is_over(539.0)
        writes(5000)
        assert progress.is_over(540.0)
    finally:
        child.stdin.close()
        child.wait()
        child.stdout.close()


def test_where_nobody_is_answered_the_rest_is_not_tried(wandb: FakeWandb, tmp_path: Path) -> None:
    for n in (1, 2):
        a_run(tmp_path, f"run-{n}")
    wandb.refuse_key = True
    first, second = sync.replay_all(tmp_path)
    assert "credentials" in first.why and (second.told, second.left, second.why) == (0, 6, "not tried")


def test_the_next_command_tells_wandb_what_is_left(wandb: FakeWandb, tmp_path: Path) -> None:
    output = tmp_path / "nemotron-output"
    append_event(RunDir(a_run(output).run_dir).events, "finished", state="failed", stage=None, cause="x")
    nemotron(tmp_path, "artifacts", "list")
    until = time.monotonic() + 180
    while pending(output) and time.monotonic() < until:  # the process that nobody waits for says so at its end
        time.sleep(0.1)
    assert pending(output) == []
    whole(wandb)


def test_without_a_key_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    journal = a_run(tmp_path)
    assert not sync.can_reach(os.environ) and not sync.in_background(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    outcome = sync.replay(journal.run_dir)
    assert outcome.left == 6 and "api_key" in outcome.why.lower().replace("api key", "api_key"), outcome
    assert pending(tmp_path) == ["run-1"]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert sync.can_reach(os.environ) and not sync.can_reach({**os.environ, "WANDB_MODE": "offline"})


def test_an_artifact_that_only_wandb_has_becomes_a_version_once(wandb: FakeWandb, tmp_path: Path) -> None:
    import wandb as sdk

    origin = a_run(tmp_path / "elsewhere", upload="files")
    assert sync.replay(origin.run_dir).why == ""
    model = Store(tmp_path / "elsewhere/store").resolve("model")
    fake_sdk = type("FakeSdk", (), {"Api": lambda timeout: None, "Artifact": sdk.Artifact})
    assert origin.target is not None
    sent = Teller(fake_sdk, origin.run_dir, origin.target)._reference(named(origin.target, model), model)
    assert [entry.local_path for entry in sent.manifest.entries.values()] == [f"{model.uri}/x"], "sent as it lies"
    pinned = pull.describe("team/p/ModelArtifact-sft:latest", "model")
    assert (pinned.label, bool(pinned.digest)) == ("wandb:team/p/ModelArtifact-sft:v0", True)
    store = Store(tmp_path / "here")
    found = pull.ensure(store, pinned, download=True)
    store.verify(found)
    assert found.digest == model.digest and store.describe(found)["metadata"]["wandb"] == "team/p/ModelArtifact-sft:v0"
    asked = len(wandb.asked)
    assert pull.ensure(store, pinned, download=True) == found and len(wandb.asked) == asked, "downloaded once"
    with pytest.raises(UserError, match="isn't what was planned"):
        pull.ensure(store, replace(pinned, digest="other"), download=True)
    blob = next(name for name, data in wandb.blobs.items() if data == b"model of run-1")
    wandb.blobs[blob] = b"model of run-2"
    with pytest.raises(UserError):
        pull.ensure(Store(tmp_path / "third"), pinned, download=True)
    assert Store(tmp_path / "third").names() == []


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    class Found:
        manifest = type("Manifest", (), {"entries": {name: None}})

    with pytest.raises(ValueError, match="leads out"):
        pull._download(Found(), tmp_path)
