"""`nemotron models fetch` with the real huggingface_hub, from a hub on this machine that fails on purpose."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from nemotron_recipes.artifacts import hub as hub_of_artifacts
from nemotron_recipes.errors import UserError
from tests.helpers.hub_server import COMMIT, HubServer

# The second is larger than what the client reads at a time.
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 98304,
}
LOCAL = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1], revision=sys.argv[2]))"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    rows = {"data/train.jsonl": b"{}\n"}
    with HubServer({"org/model": FILES, "org/rows": rows, "org/gated": FILES}) as server:
        yield server


def run(hub: HubServer, home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    quiet = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **quiet, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def fetch(hub: HubServer, home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(hub, home, "-m", "nemotron_recipes", "models", "fetch", *words, **environment)


def test_it_waits_resumes_and_is_whole_and_jobs_then_need_no_hub(hub: HubServer, tmp_path: Path) -> None:
    hub.fail = {"org/model": ["rate"], "model.safetensors": ["rate", "cut"]}
    done = fetch(hub, tmp_path, "org/model", "--json")
    assert done.returncode == 0, done.stderr
    assert "trying again in 0 s" in done.stderr, "the hub's own time was not taken"
    (made,) = json.loads(done.stdout)
    assert made["reference"] == f"hf://org/model@{COMMIT}" and not hub.fail["model.safetensors"]
    assert {p.name: p.read_bytes() for p in Path(made["folder"]).iterdir()} == FILES
    assert [r for _, path, r in hub.asked if path.endswith("model.safetensors") and r], (
        "it did not go on where it was cut"
    )

    hub.asked.clear()
    assert fetch(hub, tmp_path, f"hf://org/model@{COMMIT}").returncode == 0
    assert not [path for method, path, _ in hub.asked if method == "GET" and "resolve" in path], (
        "nothing is fetched twice"
    )

    hub.asked.clear()
    there = run(hub, tmp_path, "-c", LOCAL, "org/model", COMMIT, HF_HUB_OFFLINE="1")
    assert there.stdout.strip() == made["folder"] and hub.asked == []


def test_data_sets_and_a_profiles_cache(hub: HubServer, tmp_path: Path) -> None:
    profile = f'[here]\nexecutor = "slurm"\ntime = "1:00:00"\nhf_cache = "{tmp_path / "shared"}"\n'
    (tmp_path / "env.toml").write_text(profile)
    done = fetch(hub, tmp_path, "org/rows@main", "--data", "--run", "here", NEMOTRON_ENV=str(tmp_path / "env.toml"))
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "shared").rglob("train.jsonl")
    assert found.read_bytes() == b"{}\n" and COMMIT in str(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("org/none",), "the hub refuses org/none@main"),
        (("org/gated",), "the hub refuses org/gated: "),
        (("org/model@nosuch",), "the hub refuses org/model@nosuch"),
        (("just-a-name",), "is no repository of the hub"),
        (("org/model", "--to", "x", "--run", "here"), "exclude each other"),
    ],
)
def test_what_can_not_be_fetched_is_a_wrong_request(
    hub: HubServer, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    done = fetch(hub, tmp_path, *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOTDIR])
def test_what_waiting_does_not_mend_is_told_at_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_download(name: str, **how: object) -> str:
        raise OSError(number, os.strerror(number), str(tmp_path / "blobs"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    wanted = hub_of_artifacts.Repository("org/model", "model", COMMIT, {"config.json": 2})
    with pytest.raises(UserError, match=os.strerror(number)) as caught:
        hub_of_artifacts.fetch(wanted, tmp_path, lambda text: pytest.fail(f"it waits: {text}"))
    assert "--to" in caught.value.problems[0].fix
